"""Rewards: how good a response is.

A reward component is a number for each answer; a task names its components, and
`rewards.weights` weighs them. Each component lies in a file of its own here (`format.py`,
`temporal_iou.py`, ...). `score.py` computes those that read the text, `weights.py` checks the
weights, `manager.py` puts everything together, `user_functions.py` runs a user's own functions.
"""
