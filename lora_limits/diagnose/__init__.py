"""`lora-limits diagnose`: what the theorems say of a real model, head by head. Needs the extra
`models`.

loading      a local model folder, its tokenizer, windows of a text: or one line on why not
adapters     LoRA adapters: read and written by peft, as `Adapter`s of heads and back
activations  hooks: what each projection sees, the queries, keys and values that meet, what the attention puts out
heads        recording -> LoRAProblem, after a check that it rebuilds the model's own output
measure      norms, gradient errors, the cheapest method at the tolerance, gradient noise
times        seconds against the exact gradient, at this length and where the method begins to pay
dials        the norm bound, the rank and the mini-batch that each head would need, in words
report       table and JSON;  picture: the map of layers and heads;  command: all of it
"""
