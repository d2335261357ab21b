"""The list of methods: what each trains, what it costs, where it comes from, what is verified."""
