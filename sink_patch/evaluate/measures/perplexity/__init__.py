"""`sink-patch eval perplexity`: does a model stay fluent in a stream far longer than the window?"""
