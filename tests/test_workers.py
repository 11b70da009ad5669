"""Data workers that find no room for a batch, in shared memory or in the folder of temporary files: one sentence."""

import errno
import multiprocessing.util
import os
import resource
import signal

import pytest
from toy import Rows, make_trainer, toy_tokenizer

from captioning import InputError
from captioning.training import resumable
from captioning.training.resilience import explained


def no_shared_memory(worker, then=None):
    """No file may grow, those in shared memory neither."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


def no_temporary_folder(worker, then=None):
    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    multiprocessing.util.get_temp_dir = full


@pytest.mark.parametrize("full", [no_shared_memory, no_temporary_folder])
def test_no_room_for_a_batch_is_said_in_a_sentence(full, tmp_path, monkeypatch, capfd):
    tokenizer = toy_tokenizer()
    trainer = make_trainer(tokenizer, Rows(tokenizer, 8), tmp_path, dataloader_num_workers=1, max_steps=2)
    monkeypatch.setattr(resumable, "in_own_group", full)
    message = r"^no room for what the data workers hand over, in shared memory"
    with pytest.raises(InputError, match=message) as error, explained(trainer.args):
        trainer.train()
    assert "--dataloader_num_workers 0 (now 1)" in str(error.value) and "\n" not in str(error.value)
    assert "Traceback" not in capfd.readouterr().err


def test_batches_of_workers_are_those_without(tmp_path):
    tokenizer = toy_tokenizer()
    losses = []
    for workers in (0, 1):
        trainer = make_trainer(tokenizer, Rows(tokenizer, 8), tmp_path, dataloader_num_workers=workers, max_steps=2)
        losses.append(trainer.train().training_loss)
    assert losses[0] == losses[1]
