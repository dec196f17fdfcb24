"""Where scores are small: the frame, blocks of tokens in it, sweeps over them, samples, sums over
devices.
"""
