"""`lora-limits diagnose`: what the theorems say of a real model, head by head.

Needs the extra `models`. In the order in which a diagnosis is made:

command      the command; diagnosis: all heads of a model
loading      a local model folder, its tokenizer: or one line on why not
texts        windows of a text, labelled lines; task: the loss that a model of this class has
adapters     LoRA adapters as peft reads and writes them, and whose they are
layers       where attention is in a model; selection: which heads are looked at
recording    one pass and its backward pass: Q, K, V, masks and dl/dO; recordings: all windows
losses       the loss of a pass, without all logits at once
store        recordings on disk, read layer by layer
projections  weights and adapters of a head, fused projections taken apart
positions    rotary positions, found from what goes in and what comes out
parts        one projection of one head; heads: recording -> LoRAProblem, after a check against the model
outputs      the output of a head; with smaller scores, and on all windows as one text
measure      one head: norms, and what the next three say of it
errors       gradient errors and gradient noise
methods      the methods tried, the cheapest at the tolerance, the norms that one would need
longer       lengths beyond the windows', measured in the model where its positions reach them
times        seconds against the exact gradient, at this length and where the method begins to pay
step         a training step with attention and without: the most that any method can save
dials        the norm bound, the rank and the mini-batch that each head would need, in words
advice       what to do; summary: in ten lines; report: table, JSON, sentences
picture      maps and dials, drawn; page: everything in one HTML file
"""
