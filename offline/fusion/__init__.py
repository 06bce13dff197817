"""Fusion Steering (arXiv 2505.22572): a reference vector for each prompt, and scales searched for it.

A question's reference vector is the mean output of each block over the tokens of a reference answer,
less the mean over the prompt's own tokens. Scales are searched for each question with its gold answer
at hand, so the method shows what steering could do and is nothing that could be deployed.
"""
