"""`lora-limits diagnose`: what the theorems say of a real model, head by head.

Needs the extra `models`. In the order in which a diagnosis is made:

command      the command; diagnosis: all heads of a model
loading      a local model folder, its tokenizer, windows of a text: or one line on why not
adapters     LoRA adapters: read and written by peft, as `Adapter`s of heads and back
activations  hooks: inputs of the projections, what meets in the scores, the attention's output
heads        recording -> LoRAProblem, after a check that it rebuilds the model's own output
measure      one head: norms, and what the next four say of it
errors       gradient errors and gradient noise
methods      the methods tried, the cheapest at the tolerance, the norms that one would need
altered      the head with smaller scores, and on all windows as one text
times        seconds against the exact gradient, at this length and where the method begins to pay
dials        the norm bound, the rank and the mini-batch that each head would need, in words
report       table and JSON; picture, maps: the same drawn
"""
