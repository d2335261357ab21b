"""The demo: a small frozen ViT, pretrained on generated images, learns scikit-learn's digits.

`generate` draws the pretraining images, `pretrain` trains the ViT of `backbone`; `digits` serves
the images, `methods` says what is put on the ViT, `training` trains it; `compare` (and `tune`) are
the commands, `session` is what they write and print.
"""
