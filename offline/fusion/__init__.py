"""Fusion Steering (arXiv 2505.22572): each prompt is moved towards a reference, by scales searched for it.

A question's reference is the mean output of each block over the tokens of a reference answer. Scales are
searched for each question with its gold answer at hand, so the method shows an upper bound and cannot be
deployed.
"""
