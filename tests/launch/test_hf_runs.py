"""Training from a Hugging Face folder, and `ringattn export`."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ringattn.errors import UserError
from ringattn.launch.checkpoint import find_checkpoints, load_tensors
from ringattn.launch.config_check import resolve_model
from ringattn.launch.config_load import config_from_values
from ringattn.launch.hf_weights import HFWeights
from ringattn.launch.job import open_job
from ringattn.launch.main import main
from ringattn.launch.model import Transformer, fill_weights
from ringattn.launch.prepare import prepare
from ringattn.launch.run_folder import read_model
from tests.launch.corpora import write_jsonl
from tests.launch.hf_checkpoints import SHAPE, build, logits_of, save
from tests.launch.test_data_tokenizer import write_tokenizer
from tests.launch.training import tiny_values, train_pooled


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus in a Hugging Face tokenizer's ids."""
    folder = tmp_path_factory.mktemp("words")
    write_tokenizer(folder / "tokenizer")
    texts = ["the quick brown fox jumps over the lazy dog " * (1 + i % 7) for i in range(60)]
    source = write_jsonl(folder / "texts.jsonl", texts)
    prepare(source, folder / "corpus", tokenizer=str(folder / "tokenizer"), holdout=0.1, seed=1)
    return folder / "corpus"
