"""``ringattn sample``: text from the newest checkpoint of a run."""

from collections.abc import Callable
from pathlib import Path

import torch

from ringattn.launch.checkpoint import load_tensors
from ringattn.launch.initial_weights import choose_weights, sound_weights
from ringattn.launch.model import Transformer
from ringattn.launch.run_folder import read_model
from ringattn.launch.sample import generate


def sample_run(
    folder: Path,
    prompt: str,
    *,
    tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
    write: Callable[[str], None],
) -> None:
    """Continues `prompt` with the newest sound checkpoint of a run, on a GPU if there is one.

    Args:
        folder: the run's folder.
        prompt, tokens, temperature, top_k, seed: as in `ringattn.launch.sample.generate`.
        write: receives the prompt with its continuation.

    Raises:
        UserError: no run, no checkpoint, or values out of range.
    """
    shape, tokenizer = read_model(folder)
    path = sound_weights(choose_weights(folder, shape, f"run {folder}"))
    model = Transformer(shape).eval()
    weights = {f"model/{name}": p.detach() for name, p in model.named_parameters()}
    load_tensors(path, weights, alone=True, verified=True)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    text = generate(
        model,
        tokenizer,
        prompt,
        tokens=tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
    )
    write(prompt + text)
