"""Weights that arrive whole: safetensors, or pickles read by the restricted loader; each tensor is accounted for.

    encoder, missing = load_weights(AutoModel, folder, config, "--encoder 'facebook/dinov2-small'")

`from_pretrained` fills what a file lacks with random numbers and passes over what it does not know. Here only what is
known to be absent from sound files may be: a cross-attention, a pooler, the token of masked images.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import pickle
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from captioning import InputError
from captioning.cli import note
from captioning.files import is_whole_safetensors
from captioning.model.limits import OBJECTS, check_depth, check_size, stored_shapes

PICKLED = "pytorch_model.bin"  # the hub's name of old; in parts: pytorch_model-00001-of-00002.bin and an index


def is_cross_attention(parameter: str) -> bool:
    """Whether a parameter belongs to what connects the decoder to the image."""
    return ".crossattention." in parameter or ".ln_cross_attn." in parameter or parameter.startswith("enc_to_dec_proj")


def reaches_no_caption(parameter: str) -> bool:
    """Whether no caption depends on a parameter: a pooler, the token of masked images."""
    return bool(re.search(r"(^|\.)pooler\.|(^|\.)mask_token$", parameter))


def load_weights(kind: Any, folder: Path, config: Any, what: str, **options) -> tuple[Any, set[str]]:
    """A model in float32 from a folder's weights.

    Args:
        kind: a class of transformers with `from_pretrained`.
        config: of the model, which need not be the one in the folder.
        what: how messages call the folder, such as "--decoder 'gpt2'".
        options: absent: whether a parameter may be missing, by its name.
            generation_config: how it generates; the folder's own is never read here.
            surplus: whether a tensor of the file that the model has no place for is to be passed over, by its name.

    Returns:
        The model, and the names of the parameters that the file does not hold. Those have random values.

    Raises:
        InputError: the weights cannot be read, or are not those of `config`.
    """
    absent = options.get("absent", reaches_no_caption)
    surplus = options.get("surplus", lambda name: False)
    options.setdefault("generation_config", GenerationConfig())
    with as_safetensors(folder, what) as source:
        shapes = stored_shapes(source)
        check_depth(config.to_dict(), len(shapes), what)
        blank = _blank(kind, config, what)
        held = sum(map(math.prod, shapes.values()))
        check_size(sum(parameter.numel() for parameter in blank.parameters()), held, what)
        del blank
        try:
            # float32 said aloud: transformers 5 otherwise keeps the stored dtype, and float16 fails to learn.
            model, found = kind.from_pretrained(
                source,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                generation_config=options["generation_config"],  # or it would read the folder's own
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are told by name below
            )
        except Exception as error:  # whatever a model's class makes of settings and tensors that cannot be
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"cannot load the weights of {what}: {reason[:300]}") from None
    for name, stored, wanted in sorted(found["mismatched_keys"]):
        sizes = " and ".join("x".join(map(str, size)) for size in (stored, wanted))
        raise InputError(
            f"{what} does not fit its config.json: {name} is {sizes} (stored, and as the config says); "
            "name a folder whose files belong together"
        )
    missing = set(found["missing_keys"])
    lost = sorted(name for name in missing if not absent(name))
    if lost:
        others = sorted(set(found["unexpected_keys"]) - set(lost))
        hint = f"; instead it holds {others[0]}" if others else ""
        raise InputError(
            f"{what} lacks {len(lost):,} of its weights, such as {lost[0]}{hint}; copy it again or name another"
        )
    more = sorted(name for name in _beyond(model, found["unexpected_keys"]) if not surplus(name))
    if more:
        raise InputError(
            f"{what} holds {len(more):,} weights that its config.json leaves no place for, such as {more[0]}; "
            "name a folder whose files belong together"
        )
    for name, tensor in model.state_dict().items():
        if tensor.numel() and not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
            raise InputError(f"{what} holds a number that is not finite, in {name}; copy it again or name another")
    return model, missing


def _blank(kind: Any, config: Any, what: str) -> Any:
    """The model without its weights, which takes no memory."""
    try:
        with torch.device("meta"):
            return kind.from_config(config) if hasattr(kind, "from_config") else kind(copy.deepcopy(config))
    except Exception as error:  # whatever a model's class makes of settings that cannot be
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{what} has a config.json that no model can be built of: {reason[:300]}") from None


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """The first 16 hexadecimal digits of a SHA-256 of tensors, such as a model's, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _beyond(model: Any, unexpected: Iterable[str]) -> list[str]:
    """Of the tensors without a place, those of further layers of the same kind; heads of other tasks are not."""

    def pattern(name: str) -> str:
        return re.sub(r"\d+", "N", name.removeprefix(f"{model.base_model_prefix}."))

    own = {pattern(name) for name in model.state_dict()}
    return [name for name in unexpected if re.search(r"\.\d+\.", name) and pattern(name) in own]


@contextlib.contextmanager
def as_safetensors(folder: Path, what: str) -> Iterator[Path]:
    """A folder with the same model as `folder`, whose weights are safetensors.

    Pickled weights are read by torch's restricted loader, which builds tensors and nothing else, and written as
    safetensors into a temporary folder.

    Raises:
        InputError: there are no weights, they are damaged, or the pickle asks for anything but tensors.
    """
    weights = sorted(folder.glob("*.safetensors"))
    for file in weights:
        if not is_whole_safetensors(file):
            raise InputError(f"{what} has a damaged {file.name}, cut short perhaps; copy or write it again")
    if weights:
        yield folder
        return
    files = pickled_files(folder)
    if not files:
        others = [path.name for ending in ("bin", "pt", "pth", "ckpt") for path in sorted(folder.glob(f"*.{ending}"))]
        found = f", only {others[0]}, which is not a name that transformers writes" if others else ""
        raise InputError(f"{what} holds no model.safetensors and no {PICKLED}{found}; name a folder with weights")
    from safetensors.torch import save_file

    note(f"{what}: its weights are pickled; they are read without running any code, and written as safetensors")
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        tensors |= read_pickle(file, what)
    with tempfile.TemporaryDirectory(prefix="captioning-") as temporary:
        for name in OBJECTS:
            if (folder / name).is_file():
                shutil.copy(folder / name, temporary)
        # A copy of each, because two names may share one tensor, which safetensors cannot store.
        save_file({k: v.clone().contiguous() for k, v in tensors.items()}, Path(temporary, "model.safetensors"))
        del tensors
        yield Path(temporary)


def pickled_files(folder: Path) -> list[Path]:
    """The files of pickled weights, in one part or several, that lie in a folder."""
    index = folder / f"{PICKLED}.index.json"
    if (folder / PICKLED).is_file():
        return [folder / PICKLED]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return [folder / Path(str(name)).name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def read_pickle(file: Path, what: str) -> dict[str, torch.Tensor]:
    """The tensors by name of a pickled state dict.

    Raises:
        InputError: it is damaged, asks for anything but tensors, or would take far more memory than the file's size.
    """
    remedy = "name a folder with safetensors weights"
    try:
        size = file.stat().st_size
        if zipfile.is_zipfile(file):  # torch stores tensors in a zip archive, without compression
            with zipfile.ZipFile(file) as archive:
                if sum(member.file_size for member in archive.infolist()) > 2 * size + 1_000_000:
                    raise InputError(f"{what}: {file.name} unpacks to far more than its size; {remedy}")
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(
            f"{what}: {file.name} is damaged, or asks to run code when it is opened, which is never done; {remedy}"
        ) from None
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, AttributeError, TypeError, zipfile.BadZipFile):
        raise InputError(f"{what} has a damaged {file.name}, cut short perhaps; copy it again or {remedy}") from None
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in content.items()
    ):
        raise InputError(f"{what}: {file.name} holds other things than tensors by name; {remedy}")
    for name, tensor in content.items():
        if tensor.is_sparse or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise InputError(f"{what}: {name} in {file.name} is larger than what the file holds of it; {remedy}")
    # Each gets memory of its own later. Names may share a tensor, as tied embeddings do, but not by the thousand.
    if sum(tensor.numel() * tensor.element_size() for tensor in content.values()) > 3 * size + 1_000_000:
        raise InputError(f"{what}: the tensors of {file.name} together are far larger than the file; {remedy}")
    return content
