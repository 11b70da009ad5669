"""What the files of a model folder may ask for, looked at before anything is built of them.

    settings = read_settings(folder, "--encoder 'x'")       # config.json
    check_size(blank, settings, folder, "--encoder 'x'")    # against what the weights file holds, and free memory
    decoding, dropped = decoding_settings(content, ...)     # generation_config.json: an allow-list

A folder may come from anybody. What counts for memory or time is bounded, what asks for other packages or for code is
refused, and no file is opened that is none.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from captioning import InputError
from captioning.files import is_whole_safetensors
from captioning.foreign import (
    MOST_BYTES,
    Check,
    check,
    either,
    flag,
    list_of,
    null,
    number,
    one_of,
    read_bytes,
    read_json,
    refuse_special,
    shown,
    text,
    whole,
)

# ---- files

OBJECTS = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
)
INDEX = ".index.json"


def check_files(folder: Path, what: str) -> None:
    """Refuse a folder in which a file that is read is none, is too long, or is no JSON where it should be.

    Args:
        what: how messages call the folder, such as "--encoder 'x'".

    Raises:
        InputError: one is.
    """
    if (folder / "adapter_config.json").exists():
        raise InputError(
            f"{what} is an adapter, which needs another package (peft); merge it into its model, and name that folder"
        )
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".json", ".txt", ".model", ".jinja", ".safetensors", ".bin"):
            continue
        try:
            if path.name in OBJECTS or path.name.endswith(INDEX):
                if not isinstance(read_json(path, "copy it again"), dict):
                    raise InputError(f"'{path}' is not a JSON object; copy it again")
            elif path.suffix in (".safetensors", ".bin"):
                refuse_special(path)
            elif path.suffix != ".json":
                read_bytes(path)
        except (InputError, OSError) as error:
            if isinstance(error, FileNotFoundError) or not path.exists():
                error = InputError(f"'{path}' is a link to nowhere; copy it again")
            raise InputError(f"{what} {_unusable(path.name)} ({error})") from None


def _unusable(name: str) -> str:
    if name == "config.json":
        return "has a config.json that transformers cannot use"
    if "processor" in name:
        return f"has no usable {name}"
    return "has no usable tokenizer" if "token" in name or "vocab" in name else f"has a {name} that cannot be used"


# ---- config.json

DEPTH = r"layers?$|blocks$|stages?$|depths?$"
# What can be asked for, by the name of the setting; the first that fits. A list's members count one by one.
WHOLE: dict[str, tuple[int, int]] = {
    r"num_labels$": (0, 50_000),
    r"(image|img)_size$|input_size$": (1, 4096),
    r"window_size|window_block_indices": (0, 1024),
    r"patch_sizes?$|strides?$|kernel_size|sr_ratios?$|expand_ratio": (1, 1024),
    r"num_channels$|n_channels$": (1, 1024),
    r"head_dim$": (1, 65_536),
    r"heads?$": (1, 1024),
    DEPTH: (0, 1000),
    r"vocab_size$": (1, 4_000_000),
    r"(hidden|embed|embedding|intermediate|projection|encoder|conv).*(size|sizes|dim|dims)$": (1, 1_000_000),
    r"n_(embd|positions|ctx|inner)$|max_position_embeddings$": (1, 1_000_000),
}
NUMBERS: dict[str, tuple[float, float]] = {
    r"drop|pdrop": (0, 1),
    r"eps(ilon)?$": (0, 1),
    r"initializer|init_": (-100, 100),
    r"ratio$": (0, 1000),
}
OTHERS = (-(2**40), 2**40)
# What `transformers` would make of these changes what a model returns, or asks for what is not here.
LEFT_OUT = ("output_attentions", "output_hidden_states", "return_dict", "use_return_dict", "torchscript")
ATTENTION = re.compile(r"_?attn_implementation(_internal|_autoset)?$|attention_implementation$")
MOST_TOKENS = 16_384  # patches of an image


def read_settings(folder: Path, what: str) -> dict[str, Any]:
    """What a folder's config.json says, without what changes what a model returns.

    Raises:
        InputError: it is no JSON object, asks for code or for other packages, or for what no model has.
    """
    path = folder / "config.json"
    if not path.exists():
        raise InputError(f"{what} has no config.json; it is not a model folder")
    try:
        settings = read_json(path, "copy it again", finite=True)
        if not isinstance(settings, dict):
            raise InputError(f"it holds a {type(settings).__name__}")
    except InputError as error:
        raise InputError(f"{what} has a config.json that transformers cannot use: {error}") from None
    for place in _objects(settings):
        for name, value in list(place.items()):
            if name == "auto_map" and value:
                raise InputError(f"{what} asks to run code of its own (auto_map), which is never done")
            if name in ("quantization_config", "compression_config") and value:
                kind = value.get("quant_method", "") if isinstance(value, dict) else ""
                raise InputError(
                    f"{what} is quantised ({shown(kind)}), which needs another package; name a folder with its full "
                    "weights"
                )
            if ATTENTION.search(name) and value not in (None, "eager", "sdpa", True, False):
                raise InputError(
                    f"{what} asks for the attention {shown(value)}, which needs another package; remove {name} from "
                    "its config.json"
                )
            if name in ("use_kernels", "kernel_config") and value:
                raise InputError(f"{what} asks for kernels from elsewhere; remove {name} from its config.json")
            if name in LEFT_OUT:
                del place[name]
                continue
            _check_setting(name, value, f"the config.json of {what}")
    return settings


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """An object and all objects in it."""
    level = [value]
    while level:
        yield from (each for each in level if isinstance(each, dict))
        nested = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list))
        level = [own for each in nested for own in each]


def _check_setting(name: str, value: Any, where: str) -> None:
    """Refuse a value that no model has: layers, widths and sides beyond all that exist, shares below 0."""
    if isinstance(value, dict | list) and len(value) > 50_000:
        raise InputError(f"{where} says {name} {shown(value)}, more than are read; correct it")
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, bool) or not isinstance(each, int | float):
            continue
        numbers = next((limits for pattern, limits in NUMBERS.items() if re.search(pattern, name)), None)
        least, most = numbers or next((limits for key, limits in WHOLE.items() if re.search(key, name)), OTHERS)
        if wanted := number(least, most)(each):
            raise InputError(f"{where} says {name} {shown(value)}, and {wanted} is what can be used; correct it")


def check_sides(config: Any, what: str, size: Any = None) -> None:
    """Refuse more patches than an encoder can see at a time.

    Args:
        size: of the image in pixels, where it is not the one that the configuration says.

    Raises:
        InputError: the image is too large for its patches.
    """
    if hasattr(config, "first"):  # two encoders: what each says itself, and what it gets
        for part, its_size in ((config.first, config.image_size), (config.second, config.second_image_size)):
            check_sides(part, what)
            check_sides(part, what, its_size)
        return
    # What names no patch (SegFormer, ResNet) has places of 4 to 32 pixels.
    side, patch = size or getattr(config, "image_size", None), getattr(config, "patch_size", None) or 8
    sides = side if isinstance(side, list | tuple) else [side, side]
    patches = patch if isinstance(patch, list | tuple) else [patch, patch]
    if not all(isinstance(each, int) and each > 0 for each in [*sides, *patches]) or len(sides) != len(patches):
        return
    tokens = math.prod(max(1, one // other) for one, other in zip(sides, patches, strict=True))
    if tokens > MOST_TOKENS:
        raise InputError(
            f"{what} sees images of {'x'.join(map(str, sides))} pixels in {tokens:,} patches, and {MOST_TOKENS:,} are "
            "the most that can be used; correct its config.json"
        )


# ---- weights


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in a folder's safetensors files, read from their headers; empty where there are none.

    Raises:
        InputError: a header is damaged.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if not is_whole_safetensors(path):
            raise InputError(f"a damaged {path.name}, cut short perhaps; copy or write it again")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, MOST_BYTES)))
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    return shapes


def check_depth(settings: Mapping[str, Any], tensors: int, what: str) -> None:
    """Refuse more layers than a weights file has tensors, before they are built; a few take no time.

    Raises:
        InputError: there are more.
    """
    for place in _objects(settings):
        for name, value in place.items():
            counts = value if isinstance(value, list | tuple) else [value]
            if (
                re.search(DEPTH, str(name))
                and all(type(count) is int for count in counts)
                and sum(counts) > max(tensors, 48)
            ):
                raise InputError(
                    f"the config.json of {what} says {name} {shown(value)}, and its weights hold {tensors:,} tensors; "
                    "name a folder whose files belong together"
                )


def check_size(wanted: int, held: int, what: str) -> None:
    """Refuse a model that is far larger than its weights, or than free memory, before memory is asked for.

    Args:
        wanted: numbers that the model has, as config.json says.
        held: numbers in the weights file.

    Raises:
        InputError: the model is too large.
    """
    # A cross-attention, a pooler, a projection may be missing from the file; they are no larger than the rest.
    if wanted > 3 * held + 10_000_000:
        raise InputError(
            f"{what} does not fit its config.json, which asks for {wanted:,} numbers, and its weights hold {held:,}; "
            "name a folder whose files belong together"
        )
    import psutil

    free = psutil.virtual_memory().available
    if 4 * wanted > free:
        raise InputError(
            f"{what} needs {4 * wanted / 1e9:,.1f} GB of memory, and {free / 1e9:,.1f} GB are free; name a smaller one"
        )


# ---- generation_config.json


def _token(vocabulary: int) -> Check:
    return whole(0, vocabulary - 1)


def decoding_schema(vocabulary: int, positions: int) -> dict[str, Check]:
    """The settings of `generate` that are used here, and what each can be.

    Args:
        vocabulary: tokens.
        positions: of the decoder, more than a caption has tokens.
    """
    token = _token(vocabulary)
    tokens = either(token, list_of(token, 1, 100))
    share = number(0, 1)
    schema: dict[str, Check] = {
        "num_beams": whole(1, 64),
        "max_new_tokens": whole(1, positions - 1),
        "max_length": whole(1, max(positions, 20)),
        "min_length": whole(0, positions),
        "min_new_tokens": whole(0, positions),
        "early_stopping": either(flag, one_of("never")),
        "length_penalty": number(-100, 100),
        "repetition_penalty": number(0.01, 100),
        "no_repeat_ngram_size": whole(0, positions),
        "do_sample": flag,
        "temperature": number(0.01, 100),
        "top_k": whole(0, vocabulary),
        "top_p": share,
        "min_p": share,
        "typical_p": share,
        "epsilon_cutoff": share,
        "eta_cutoff": share,
        "renormalize_logits": flag,
        "remove_invalid_values": flag,
        "bad_words_ids": list_of(list_of(token, 1, 100), 1, 10_000),
        "suppress_tokens": list_of(token, 0, vocabulary),
        "begin_suppress_tokens": list_of(token, 0, vocabulary),
        "forced_bos_token_id": token,
        "forced_eos_token_id": tokens,
        "decoder_start_token_id": token,
        "bos_token_id": token,
        "eos_token_id": tokens,
        "pad_token_id": token,
    }
    return {name: either(right, null) for name, right in schema.items()}


# What other settings are where they ask for nothing, besides null, false and empty.
NOTHING: dict[str, Any] = {
    "num_return_sequences": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "guidance_scale": 1,
    "use_cache": True,
    "penalty_alpha": 0,
}
# Ways to search that are code from a hub since version 5.
CODE = (
    *("constraints", "force_words_ids", "num_beam_groups", "diversity_penalty", "penalty_alpha", "dola_layers"),
    *("custom_generate", "trust_remote_code"),
)
TOLD = ("transformers_version", "_from_model_config", "_commit_hash", "generation_kwargs", "model_type")
# Defaults of version 4, which it wrote out.
USUAL = (
    *("assistant_confidence_threshold", "assistant_lookbehind", "num_assistant_tokens", "prefill_chunk_size"),
    *("num_assistant_tokens_schedule", "target_lookbehind", "max_matching_ngram_size"),
)


def decoding_settings(
    content: Mapping[str, Any], vocabulary: int, positions: int, what: str
) -> tuple[dict[str, Any], list[str]]:
    """Of a generation_config.json what is used here, and the names of what is not, and would change what comes out.

    Raises:
        InputError: a value is out of its range, or it asks for a way to search that is code from elsewhere.
    """
    where = f"the generation_config.json of {what}"
    schema = decoding_schema(vocabulary, positions)
    known = check({name: content[name] for name in schema if name in content}, schema, where)
    dropped = []
    for name, value in content.items():
        if name in known or name in TOLD or name in USUAL:
            continue
        if value is None or value is False or value in ([], {}, "") or (name in NOTHING and NOTHING[name] == value):
            continue
        if name in CODE:
            raise InputError(
                f"{where} says {name} {shown(value)}, a way to search that is code from elsewhere, which is never run; "
                "remove it"
            )
        dropped.append(name)
    return {name: value for name, value in known.items() if value is not None}, sorted(map(str, dropped))


# ---- preprocessor_config.json


SIDE = whole(1, 4096)


def _size(value: Any) -> str | None:
    """A side, or an object of sides."""
    sides = value.values() if isinstance(value, dict) and value else [value]
    names = ("height", "width", "shortest_edge", "longest_edge")
    right = not isinstance(value, dict) or set(value) <= set(names)
    if right and all(SIDE(side) is None for side in sides):
        return None
    return f"a side from 1 to 4,096, or an object of such sides by name ({', '.join(names)})"


def _per_channel(each: Check) -> Check:
    return either(list_of(each, 1, 4), each)


PROCESSOR: dict[str, Check] = {
    "size": either(_size, null),
    "crop_size": either(_size, null),
    "image_mean": either(_per_channel(number(-1000, 1000)), null),
    "image_std": either(_per_channel(number(1e-6, 1e6)), null),
    "rescale_factor": either(number(1e-9, 1000), null),
    "resample": either(whole(0, 5), null),
    "crop_pct": either(number(0.5, 1), null),
    "image_processor_type": either(text(200), null),
    "feature_extractor_type": either(text(200), null),
    "do_resize": either(flag, null),
    "do_center_crop": either(flag, null),
    "do_rescale": either(flag, null),
    "do_normalize": either(flag, null),
    "do_convert_rgb": either(flag, null),
}


def check_processor(folder: Path, what: str) -> None:
    """Refuse an image processor's settings that cannot be: sides, means, deviations and how it resamples.

    Raises:
        InputError: one cannot be.
    """
    for name in ("processor_config.json", "preprocessor_config.json"):
        path = folder / name
        if not path.exists():
            continue
        content = read_json(path, "correct it", finite=True)
        own = content.get("image_processor", content) if isinstance(content, dict) else content
        check(own, PROCESSOR, f"the {name} of {what}", "correct it")
