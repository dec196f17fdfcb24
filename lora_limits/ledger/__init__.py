"""The ledger: every statement of the paper beside a function that measures whether it holds.

row              what an entry is, and the small problems that the checks run on
definitions      Sections 1 to 3: notation, the tensor trick, the reduced problem
tensors          the Kronecker forms of it, formed literally
exactness        Lemmas 3.1, 3.2, C.1, D.1 to D.4, Theorem F.1: exact gradients and their cost
operations       that cost, counted
approximation    Lemmas 3.3 to 3.7, D.5 to D.9, Theorems 3.1 and A.1: the almost linear algorithm
conditions       what these ask of the norms, and the remarks on it
limits           Lemma 1.1, Hypothesis 1, Theorem 4.1, Appendix E: hardness
corrections      what the printed text says taken literally, and Appendix G
decoders         rotary positions and a causal order, beyond the paper
command          all of them in the paper's order, and `lora-limits theorems`
printing         a row as lines for a terminal, or as JSON
"""
