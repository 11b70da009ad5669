"""A stub of the Hugging Face hub on 127.0.0.1: small repositories, laid out as the real ones are.

    with Hub(repositories()) as hub:
        subprocess.run(command, env={**os.environ, **hub.environment(home)})
    assert hub.fetched("openai-community/gpt2") == {"config.json", ...}

The weights are random and small. Their names, the configurations, and the files beside them are those of the
repositories, as their authors uploaded them: most are older than the library that reads them.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import safetensors.torch
import torch
from httpserver import Route, Server, body, ranged, redirect, reply

WORDS = "a two three red green blue small large dog dogs cat tree car runs sits on under beside the grass street"
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json")
# Repositories that were renamed: the hub sends whoever asks for the old name on.
MOVED = {"gpt2": "openai-community/gpt2", "distilgpt2": "distilbert/distilgpt2"}
VIT, GPT2, DISTILGPT2 = "google/vit-base-patch16-224-in21k", MOVED["gpt2"], MOVED["distilgpt2"]
SWIN, DINOV2 = "microsoft/swin-base-patch4-window7-224-in22k", "facebook/dinov2-small"
CLIP = "openai/clip-vit-base-patch16"
CAPTIONER = "nlpconnect/vit-gpt2-image-captioning"
WIDTH, HEADS, LAYERS = 32, 2, 2
VIT_ATTENTION = (*(f"attention.attention.{part}" for part in ("query", "key", "value")), "attention.output.dense")
VIT_SETTINGS = {
    "attention_probs_dropout_prob": 0.0,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "hidden_size": WIDTH,
    "initializer_range": 0.02,
    "num_attention_heads": HEADS,
    "num_channels": 3,
    "num_hidden_layers": LAYERS,
    "qkv_bias": True,
}
# What is there besides and never needed: reading it as weights fails.
OTHER_FORMATS = ("tf_model.h5", "flax_model.msgpack", ".gitattributes", "README.md")


@dataclass
class Repository:
    """The files of a repository.

    Attributes:
        files: content by name.
        tensors: what its weights hold, by their names in the files.
    """

    tensors: dict[str, torch.Tensor]
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def commit(self) -> str:
        """40 hexadecimal digits."""
        return hashlib.sha1(b"".join(self.files[name] for name in sorted(self.files))).hexdigest()

    def is_large(self, name: str) -> bool:
        """Whether the hub keeps a file elsewhere, and sends clients on to it."""
        return not name.endswith((".json", ".txt", ".md", ".gitattributes"))


# ---- the server


class Hub(Server):
    """A context manager, see `Server`. What is not there is answered as the hub does."""

    def __init__(self, repositories: dict[str, Repository]) -> None:
        super().__init__()
        self.repositories = repositories
        self.default = self._absent
        self.routes["/"] = body(b"a hub")
        self._large: dict[str, tuple[str, str]] = {}  # path -> repository, file
        for name, repository in repositories.items():
            self._serve(name, repository)
        for old, new in MOVED.items():
            if new in repositories:
                self._move(old, new)

    def environment(self, home: Path) -> dict[str, str]:
        """Environment variables with which `huggingface_hub` asks this server, and keeps what it fetches in `home`."""
        return {
            "HF_ENDPOINT": self.url(""),
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",  # a protocol of its own, for which there is no stub
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def fetched(self, name: str, since: int = 0, until: int | None = None) -> set[str]:
        """The files of a repository whose content was asked for in `self.requests[since:until]`."""
        prefix = f"/{name}/resolve/"
        found = set()
        for request in self.requests[since:until]:
            path = request.path.partition("?")[0]
            if request.method != "GET":
                continue
            if path in self._large and self._large[path][0] == name:
                found.add(self._large[path][1])
            elif path.startswith(prefix):
                found.add(path.removeprefix(prefix).partition("/")[2])
        return found

    def large(self, name: str, file: str) -> str:
        """The path that the content of a large file is served at."""
        return next(path for path, what in self._large.items() if what == (name, file))

    def _serve(self, name: str, repository: Repository) -> None:
        commit = repository.commit
        siblings = [{"rfilename": file} for file in sorted(repository.files)]
        info = {"_id": commit[:24], "id": name, "modelId": name, "sha": commit, "private": False, "gated": False}
        tree = []
        for file, content in sorted(repository.files.items()):
            blob, digest = hashlib.sha1(content).hexdigest(), hashlib.sha256(content).hexdigest()
            entry = {"type": "file", "oid": blob, "size": len(content), "path": file}
            headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes", "ETag": f'"{blob}"'}
            route: Route = _file(content, headers)
            if repository.is_large(file):
                entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
                place = f"/large/{name}/{digest}"
                self._large[place] = (name, file)
                self.routes[place] = ranged(content)
                headers |= {"X-Linked-Size": len(content), "X-Linked-ETag": f'"{digest}"'}
                headers["Location"] = f"http://localhost:{self.port}{place}"  # another host, as there
                route = _elsewhere(headers)
            tree.append(entry)
            for revision in ("main", commit):
                self.routes[f"/{name}/resolve/{revision}/{file}"] = route
        for revision in ("main", commit):
            self.routes[f"/api/models/{name}/revision/{revision}"] = _json({**info, "siblings": siblings})
            self.routes[f"/api/models/{name}/tree/{revision}"] = _json(tree)

    def _move(self, old: str, new: str) -> None:
        for path in list(self.routes):
            for prefix in ("/", "/api/models/"):
                if path.startswith(f"{prefix}{new}/"):
                    self.routes[path.replace(new, old, 1)] = redirect(path, 307)

    def _absent(self, handler: BaseHTTPRequestHandler) -> None:
        path = handler.path.removeprefix("/api/models")
        for name, repository in self.repositories.items():
            if path.startswith(f"/{name}/"):
                headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repository.commit, "Content-Length": 0}
                return reply(handler, code=404, headers=headers)
        # Anonymous clients are not told whether a repository is private or does not exist.
        headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Invalid username or password."}
        return reply(handler, code=401, headers={**headers, "Content-Length": 0})


def gated(name: str) -> Route:
    """The answer for a file of a repository whose terms have to be accepted first."""
    message = f"Access to model {name} is restricted. You must have access to it and be authenticated to access it."
    headers = {"X-Error-Code": "GatedRepo", "X-Error-Message": message, "Content-Length": 0}
    return lambda handler: reply(handler, code=401, headers=headers)


def ask(environment: dict[str, str]) -> None:
    """In a process that imported `huggingface_hub` earlier: have it ask the hub of an environment."""
    import huggingface_hub.constants

    os.environ.update(environment)
    importlib.reload(huggingface_hub.constants)


def _json(content: object) -> Route:
    return body(json.dumps(content).encode(), "application/json")


def _file(content: bytes, headers: dict[str, object]) -> Route:
    return lambda handler: reply(handler, content, headers={**headers, "Content-Length": len(content)})


def _elsewhere(headers: dict[str, object]) -> Route:
    return lambda handler: reply(handler, code=302, headers={**headers, "Content-Length": 0})


# ---- the repositories


def repositories() -> dict[str, Repository]:
    """The default encoder and decoder, the best-known others, and the best-known captioner."""
    parts = {VIT: vit(), GPT2: gpt2(), DISTILGPT2: distilgpt2(), SWIN: swin(), DINOV2: dinov2(), CLIP: clip()}
    return {**parts, CAPTIONER: captioner()}


def vit() -> Repository:
    """A ViT with a pooler; its preprocessor file knows feature extractors, and a size that is one number."""
    name = "encoder.layer.{}."
    shapes = {
        "embeddings.cls_token": (1, 1, WIDTH),
        "embeddings.position_embeddings": (1, 17, WIDTH),
        **_affine("embeddings.patch_embeddings.projection", WIDTH, 3, 8, 8),
        **_affine("layernorm", WIDTH),
        **_affine("pooler.dense", WIDTH, WIDTH),
    }
    for layer in map(name.format, range(LAYERS)):
        for part in VIT_ATTENTION:
            shapes |= _affine(layer + part, WIDTH, WIDTH)
        shapes |= _affine(layer + "intermediate.dense", 4 * WIDTH, WIDTH)
        shapes |= _affine(layer + "output.dense", WIDTH, 4 * WIDTH)
        shapes |= _affine(layer + "layernorm_before", WIDTH) | _affine(layer + "layernorm_after", WIDTH)
    config = {
        **VIT_SETTINGS,
        "architectures": ["ViTModel"],
        "image_size": 32,
        "intermediate_size": 4 * WIDTH,
        "layer_norm_eps": 1e-12,
        "model_type": "vit",
        "patch_size": 8,
        "transformers_version": "4.13.0.dev0",
    }
    preprocessor = {
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "ViTFeatureExtractor",
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
        "size": 32,
    }
    files = {"config.json": config, "preprocessor_config.json": preprocessor}
    return _repository(shapes, files, unread=("pytorch_model.bin",))


def gpt2() -> Repository:
    """The model without a head: names without "transformer.", and the causal masks among the weights."""
    vocabulary, tokenizer = gpt2_tokenizer()
    shapes = _gpt2_shapes("", vocabulary)
    extra = {f"h.{layer}.attn.bias": torch.ones(1, 1, 128, 128).tril() for layer in range(LAYERS)}
    config = _gpt2_config(vocabulary)
    generation = {
        "_from_model_config": True,
        "bos_token_id": vocabulary - 1,
        "eos_token_id": vocabulary - 1,
        "transformers_version": "4.26.0.dev0",
    }
    files = {
        "config.json": config,
        "generation_config.json": generation,
        "generation_config_for_text_generation.json": {**generation, "do_sample": True, "max_length": 50},
        "tokenizer_config.json": {"model_max_length": 1024},
        **tokenizer,
        "onnx/config.json": config,
    }
    unread = ("pytorch_model.bin", "rust_model.ot", "64.tflite", "onnx/decoder_model.onnx")
    return _repository(shapes, files, extra, unread=unread)


def distilgpt2() -> Repository:
    """The model with its head, masks of old besides, and the slow tokenizer's files alone."""
    vocabulary, tokenizer = gpt2_tokenizer()
    del tokenizer["tokenizer.json"]
    shapes = _gpt2_shapes("transformer.", vocabulary, heads=4)
    extra: dict[str, torch.Tensor] = {}
    for layer in range(LAYERS):
        extra[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 128, 128).tril().to(torch.uint8)
        extra[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    config = {
        **_gpt2_config(vocabulary, heads=4),
        "_num_labels": 1,
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
    }
    files = {"config.json": config, "tokenizer_config.json": {"model_max_length": 1024}, **tokenizer}
    tied = {"lm_head.weight": "transformer.wte.weight"}
    return _repository(shapes, files, extra, tied, unread=("pytorch_model.bin", "rust_model.ot"))


def swin() -> Repository:
    """A Swin with the head of its classes, pickled only, in two parts."""
    embed, depths, heads, window = 16, (2, 2), (2, 4), 4
    shapes = {
        **_affine("swin.embeddings.patch_embeddings.projection", embed, 3, 4, 4),
        **_affine("swin.embeddings.norm", embed),
        **_affine("swin.layernorm", 2 * embed),
        **_affine("classifier", 10, 2 * embed),
        "swin.encoder.layers.0.downsample.reduction.weight": (2 * embed, 4 * embed),
        **_affine("swin.encoder.layers.0.downsample.norm", 4 * embed),
    }
    extra: dict[str, torch.Tensor] = {}
    for stage, depth in enumerate(depths):
        width = embed * 2**stage
        for block in range(depth):
            name = f"swin.encoder.layers.{stage}.blocks.{block}."
            for part in ("query", "key", "value"):
                shapes |= _affine(f"{name}attention.self.{part}", width, width)
            shapes[f"{name}attention.self.relative_position_bias_table"] = ((2 * window - 1) ** 2, heads[stage])
            extra[f"{name}attention.self.relative_position_index"] = _relative_positions(window)
            shapes |= _affine(f"{name}attention.output.dense", width, width)
            shapes |= _affine(f"{name}intermediate.dense", 4 * width, width)
            shapes |= _affine(f"{name}output.dense", width, 4 * width)
            shapes |= _affine(f"{name}layernorm_before", width) | _affine(f"{name}layernorm_after", width)
    config = {
        "architectures": ["SwinForImageClassification"],
        "attention_probs_dropout_prob": 0.0,
        "depths": list(depths),
        "drop_path_rate": 0.1,
        "embed_dim": embed,
        "encoder_stride": 32,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": 2 * embed,
        "id2label": {str(index): f"LABEL_{index}" for index in range(10)},
        "image_size": 32,
        "initializer_range": 0.02,
        "label2id": {f"LABEL_{index}": index for index in range(10)},
        "layer_norm_eps": 1e-05,
        "mlp_ratio": 4.0,
        "model_type": "swin",
        "num_channels": 3,
        "num_heads": list(heads),
        "num_layers": len(depths),
        "patch_size": 4,
        "path_norm": True,
        "qkv_bias": True,
        "torch_dtype": "float32",
        "transformers_version": "4.16.0.dev0",
        "use_absolute_embeddings": False,
        "window_size": window,
    }
    preprocessor = {
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "ViTFeatureExtractor",
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
        "size": 32,
    }
    files = {"config.json": config, "preprocessor_config.json": preprocessor}
    return _repository(shapes, files, extra, pickled=2)


def dinov2() -> Repository:
    """A DINOv2 with more position embeddings than its images have patches, and a crop in its preprocessor file."""
    shapes = {
        "embeddings.cls_token": (1, 1, WIDTH),
        "embeddings.mask_token": (1, WIDTH),
        "embeddings.position_embeddings": (1, 26, WIDTH),
        **_affine("embeddings.patch_embeddings.projection", WIDTH, 3, 14, 14),
        **_affine("layernorm", WIDTH),
    }
    for layer in (f"encoder.layer.{index}." for index in range(LAYERS)):
        for part in VIT_ATTENTION:
            shapes |= _affine(layer + part, WIDTH, WIDTH)
        shapes |= _affine(layer + "mlp.fc1", 4 * WIDTH, WIDTH) | _affine(layer + "mlp.fc2", WIDTH, 4 * WIDTH)
        shapes |= _affine(layer + "norm1", WIDTH) | _affine(layer + "norm2", WIDTH)
        shapes |= {f"{layer}layer_scale1.lambda1": (WIDTH,), f"{layer}layer_scale2.lambda1": (WIDTH,)}
    config = {
        **VIT_SETTINGS,
        "architectures": ["Dinov2Model"],
        "drop_path_rate": 0.0,
        "image_size": 70,
        "layer_norm_eps": 1e-06,
        "layerscale_value": 1.0,
        "mlp_ratio": 4,
        "model_type": "dinov2",
        "patch_size": 14,
        "torch_dtype": "float32",
        "transformers_version": "4.32.0.dev0",
        "use_swiglu_ffn": False,
    }
    preprocessor = {
        "crop_size": {"height": 28, "width": 28},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_processor_type": "BitImageProcessor",
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": 32},
    }
    files = {"config.json": config, "preprocessor_config.json": preprocessor}
    return _repository(shapes, files, unread=("pytorch_model.bin",))


def clip() -> Repository:
    """A CLIP: the towers of text and vision, the projections of both, and numbered positions among the weights."""
    vocabulary, words, patches, projection = 99, 77, 16, 24
    shapes: dict[str, tuple[int, ...]] = {
        "logit_scale": (),
        "text_projection.weight": (projection, WIDTH),
        "visual_projection.weight": (projection, WIDTH),
        "text_model.embeddings.token_embedding.weight": (vocabulary, WIDTH),
        "text_model.embeddings.position_embedding.weight": (words, WIDTH),
        **_affine("text_model.final_layer_norm", WIDTH),
        "vision_model.embeddings.class_embedding": (WIDTH,),
        "vision_model.embeddings.patch_embedding.weight": (WIDTH, 3, 8, 8),
        "vision_model.embeddings.position_embedding.weight": (patches + 1, WIDTH),
        **_affine("vision_model.pre_layrnorm", WIDTH),  # so spelt
        **_affine("vision_model.post_layernorm", WIDTH),
    }
    layers = LAYERS + 1  # captioning leaves out the last
    for tower in ("text_model", "vision_model"):
        for layer in (f"{tower}.encoder.layers.{index}." for index in range(layers)):
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                shapes |= _affine(f"{layer}self_attn.{part}", WIDTH, WIDTH)
            shapes |= _affine(layer + "mlp.fc1", 4 * WIDTH, WIDTH) | _affine(layer + "mlp.fc2", WIDTH, 4 * WIDTH)
            shapes |= _affine(layer + "layer_norm1", WIDTH) | _affine(layer + "layer_norm2", WIDTH)
    extra = {
        "text_model.embeddings.position_ids": torch.arange(words)[None],
        "vision_model.embeddings.position_ids": torch.arange(patches + 1)[None],
    }
    tower = {
        "_name_or_path": "",
        "add_cross_attention": False,
        "architectures": None,
        "attention_dropout": 0.0,
        "bad_words_ids": None,
        "chunk_size_feed_forward": 0,
        "do_sample": False,
        "dropout": 0.0,
        "hidden_act": "quick_gelu",
        "hidden_size": WIDTH,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 4 * WIDTH,
        "layer_norm_eps": 1e-05,
        "max_length": 20,
        "num_attention_heads": HEADS,
        "num_beams": 1,
        "num_hidden_layers": layers,
        "pruned_heads": {},
        "return_dict": True,
        "tie_encoder_decoder": False,
        "torch_dtype": None,
        "transformers_version": "4.16.0.dev0",
        "use_bfloat16": False,
    }
    text = {
        "bos_token_id": 0,
        "eos_token_id": 2,
        "max_position_embeddings": words,
        "model_type": "clip_text_model",
        "pad_token_id": 1,
        "vocab_size": vocabulary,
    }
    vision = {"image_size": 32, "model_type": "clip_vision_model", "patch_size": 8}
    config = {
        "architectures": ["CLIPModel"],
        "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592,
        "model_type": "clip",
        "projection_dim": projection,
        "text_config": {**tower, **text},
        "text_config_dict": None,
        "torch_dtype": "float32",
        "transformers_version": None,
        "vision_config": {**tower, **vision},
        "vision_config_dict": None,
    }
    preprocessor = {
        "crop_size": 32,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": 32,
    }
    files = {
        "config.json": config,
        "preprocessor_config.json": preprocessor,
        "special_tokens_map.json": {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"},
    }
    return _repository(shapes, files, extra, unread=("pytorch_model.bin",))


def captioner() -> Repository:
    """A captioner of the same kind, pickled only, with the masks of old and without generation settings of its own."""
    encoder, decoder = vit(), gpt2()
    vocabulary, tokenizer = gpt2_tokenizer()
    shapes = {f"encoder.{name}": tuple(tensor.shape) for name, tensor in encoder.tensors.items()}
    shapes |= {f"decoder.{name}": shape for name, shape in _gpt2_shapes("transformer.", vocabulary).items()}
    extra: dict[str, torch.Tensor] = {}
    for layer in (f"decoder.transformer.h.{index}." for index in range(LAYERS)):
        for part, columns in (("c_attn", 2 * WIDTH), ("q_attn", WIDTH), ("c_proj", WIDTH)):
            shapes[f"{layer}crossattention.{part}.weight"] = (WIDTH, columns)
            shapes[f"{layer}crossattention.{part}.bias"] = (columns,)
        shapes |= _affine(f"{layer}ln_cross_attn", WIDTH)
        for part in ("attn", "crossattention"):
            extra[f"{layer}{part}.bias"] = torch.ones(1, 1, 128, 128).tril().to(torch.uint8)
            extra[f"{layer}{part}.masked_bias"] = torch.tensor(-1e4)
    of_old = {  # what each part's settings held of a generation's
        "_name_or_path": "",
        "bad_words_ids": None,
        "diversity_penalty": 0.0,
        "do_sample": False,
        "early_stopping": False,
        "length_penalty": 1.0,
        "max_length": 20,
        "min_length": 0,
        "no_repeat_ngram_size": 0,
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "return_dict": True,
        "temperature": 1.0,
        "top_k": 50,
        "torch_dtype": None,
        "use_bfloat16": False,
    }
    end = vocabulary - 1
    config = {
        "architectures": ["VisionEncoderDecoderModel"],
        "bos_token_id": end,
        "decoder": {
            **json.loads(decoder.files["config.json"]),
            **of_old,
            "add_cross_attention": True,
            "decoder_start_token_id": end,
            "is_decoder": True,
            "pad_token_id": end,
        },
        "decoder_start_token_id": end,
        "encoder": {**json.loads(encoder.files["config.json"]), **of_old},
        "eos_token_id": end,
        "is_encoder_decoder": True,
        "model_type": "vision-encoder-decoder",
        "pad_token_id": end,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": None,
    }
    special = dict.fromkeys(("unk_token", "bos_token", "eos_token", "pad_token"), "<|endoftext|>")
    files = {
        "config.json": config,
        "preprocessor_config.json": encoder.files["preprocessor_config.json"],
        "special_tokens_map.json": special,
        "tokenizer_config.json": {
            **special,
            "add_prefix_space": False,
            "model_max_length": 1024,
            "name_or_path": "gpt2",
            "special_tokens_map_file": None,
            "tokenizer_class": "GPT2Tokenizer",
        },
        **tokenizer,
    }
    tied = {"decoder.lm_head.weight": "decoder.transformer.wte.weight"}
    return _repository(shapes, files, extra, tied, pickled=1)


def gpt2_tokenizer() -> tuple[int, dict[str, bytes]]:
    """A byte-level BPE in the files that GPT-2's comes in, its end-of-text token the last; and how many it has."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner.train_from_iterator([WORDS] * 2, trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    model = json.loads(learner.to_str())["model"]
    vocabulary = {**model["vocab"], "<|endoftext|>": len(model["vocab"])}
    merges = [tuple(pair) for pair in model["merges"]]
    whole = Tokenizer(models.BPE(vocabulary, merges))
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.post_processor = processors.ByteLevel(trim_offsets=False)
    whole.decoder = decoders.ByteLevel()
    whole.add_special_tokens([AddedToken("<|endoftext|>", normalized=False, special=True)])
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    contents = (json.dumps(vocabulary), "\n".join(lines) + "\n", whole.to_str())
    return len(vocabulary), {name: text.encode() for name, text in zip(TOKENIZER_FILES, contents, strict=True)}


def _gpt2_config(vocabulary: int, heads: int = HEADS) -> dict[str, object]:
    return {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "bos_token_id": vocabulary - 1,
        "embd_pdrop": 0.1,
        "eos_token_id": vocabulary - 1,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 128,
        "n_embd": heads * WIDTH // HEADS,
        "n_head": heads,
        "n_layer": LAYERS,
        "n_positions": 128,
        "resid_pdrop": 0.1,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": vocabulary,
    }


def _gpt2_shapes(prefix: str, vocabulary: int, heads: int = HEADS) -> dict[str, tuple[int, ...]]:
    width = heads * WIDTH // HEADS
    shapes = {f"{prefix}wte.weight": (vocabulary, width), f"{prefix}wpe.weight": (128, width)}
    shapes |= _affine(f"{prefix}ln_f", width)
    for layer in (f"{prefix}h.{index}." for index in range(LAYERS)):
        # As rows of inputs, the other way round than elsewhere
        for part, rows, columns in (
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", width, 4 * width),
            ("mlp.c_proj", 4 * width, width),
        ):
            shapes |= {f"{layer}{part}.weight": (rows, columns), f"{layer}{part}.bias": (columns,)}
        shapes |= _affine(layer + "ln_1", width) | _affine(layer + "ln_2", width)
    return shapes


def _affine(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _relative_positions(window: int) -> torch.Tensor:
    """(window², window²), the row of the bias table for each pair of places in a window."""
    places = torch.cartesian_prod(torch.arange(window), torch.arange(window))
    offsets = places[:, None] - places[None] + window - 1
    return offsets[..., 0] * (2 * window - 1) + offsets[..., 1]


def _repository(
    shapes: dict[str, tuple[int, ...]],
    files: dict[str, object],
    extra: Mapping[str, torch.Tensor] | None = None,
    tied: Mapping[str, str] | None = None,
    pickled: int = 0,
    unread: Iterable[str] = (),
) -> Repository:
    """Random weights of these shapes.

    Args:
        files: what to write besides, bytes or JSON.
        extra: tensors that are stored among the weights.
        tied: other names under which a tensor is stored once more.
        pickled: the number of files of pickled weights; 0: they are safetensors.
        unread: names of files that are not to be read.
    """
    seed = torch.Generator().manual_seed(len(shapes))
    tensors = {name: 0.1 * torch.randn(shape, generator=seed) + ("norm" in name) for name, shape in shapes.items()}
    tensors |= extra or {}
    tensors |= {name: tensors[other].clone() for name, other in (tied or {}).items()}
    contents = {name: b if isinstance(b, bytes) else json.dumps(b, indent=2).encode() for name, b in files.items()}
    contents |= dict.fromkeys((*OTHER_FORMATS, *unread), b"not to be fetched")
    if not pickled:
        contents["model.safetensors"] = safetensors.torch.save(tensors, {"format": "pt"})
        return Repository(tensors, contents)
    if pickled == 1:
        names = dict.fromkeys(tensors, "pytorch_model.bin")
    else:
        names = {name: f"pytorch_model-{i % pickled + 1:05d}-of-{pickled:05d}.bin" for i, name in enumerate(tensors)}
    for file in set(names.values()):
        stored = io.BytesIO()
        torch.save({name: tensors[name] for name in tensors if names[name] == file}, stored)
        contents[file] = stored.getvalue()
    if pickled == 1:
        return Repository(tensors, contents)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": names}
    contents["pytorch_model.bin.index.json"] = json.dumps(index, indent=2).encode()
    return Repository(tensors, contents)
