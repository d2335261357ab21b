"""`tcpa-train inspect`: what prompts do, as one page of figures and a file of numbers.

`subjects` loads the models that are compared, `images` the pictures, `demo` makes both without any
download; `measure` computes every number with `tcpa.inspect`, `drawings` and `maps` draw them,
`page` writes them down, `run` is the command.
"""
