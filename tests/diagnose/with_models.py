"""What tests of models as transformers and peft make them share."""

import warnings

from lora_limits.cli import main


def outputs(peft_model, rows=16):
    import torch

    ids = torch.arange(rows)[None]
    with torch.no_grad():
        return peft_model(input_ids=ids)[0].numpy()


def refusal(capsys, *arguments):
    """The one line of a refusal, after what was being done."""
    capsys.readouterr()
    with warnings.catch_warnings():
        assert main(["diagnose", *map(str, arguments)]) == 2
    printed, said = capsys.readouterr()
    *doing, last = said.splitlines()
    assert printed == ""
    assert all(line.endswith("...") for line in doing), said
    assert last.startswith("error: ")
    return last


def torch_of(ids):
    import torch

    return torch.as_tensor(ids)
