"""The demo: a small frozen ViT, pretrained on generated images, learns scikit-learn's digits.

`generate` draws the pretraining images, `pretrain` trains the ViT that `backbone` defines and
loads, `data` serves the digits, `run` compares three ways to adapt it, `figures` draws the result.
"""
