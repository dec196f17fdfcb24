"""A tiny model recorded as a diagnosis records it, for tests of what comes of it."""

import contextlib
from typing import NamedTuple

from lora_limits.diagnose import adapters, heads, loading, texts
from lora_limits.diagnose.layers import find_places
from lora_limits.diagnose.projections import read_projections
from lora_limits.diagnose.recordings import Recordings
from lora_limits.diagnose.store import Store
from lora_limits.diagnose.task import find_task
from lora_limits.instruments.progress import Progress
from tests.support.tiny_models import TEXT


class Recorded(NamedTuple):
    """A peft model and its recordings, on disk while the context is open."""

    adapted: object
    task: object
    recordings: Recordings

    @property
    def base(self):
        return self.adapted.get_base_model()

    def projections(self, number, layers):
        return read_projections(self.base, self.recordings.place(number), layers[0])

    def heads(self, number):
        """{head: the problem in the first window, or why there is none} of a layer."""
        layers = self.recordings.layers(number)
        whole = self.projections(number, layers) if layers else {}
        found = {}
        for head in range(self.recordings.counts[number]):
            found[head] = self.recordings.refused.get((number, head))
            if found[head] is None:
                response = self.recordings.responses.get((number, head), 1.0)
                try:
                    found[head] = heads.make_head(layers[0], whole, head, response=response)
                except heads.Refused as error:
                    found[head] = str(error)
        return found


@contextlib.contextmanager
def recorded(folder, adapter=None, *, length=32, batch=1, change=None):
    """change: called with the peft model before it is recorded."""
    model = loading.load_model(folder)
    tokenizer = loading.load_tokenizer(folder)
    windows = texts.windows(model, tokenizer, TEXT * 8, length=length, batch=batch)
    task = find_task(model, tokenizer, windows)
    adapted = adapters.load_adapter(model, adapter) if adapter else adapters.random_adapter(model)
    if change is not None:
        change(adapted)
    base = adapted.get_base_model()
    with Store() as store:
        recordings = Recordings(base, find_places(base), windows, task, store)
        recordings.look()
        chosen = {n: tuple(range(count)) for n, count in recordings.counts.items()}
        recordings.record(chosen, Progress(quiet=True))
        yield Recorded(adapted, task, recordings)
