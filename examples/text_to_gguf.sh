#!/bin/sh
# From the texts in a folder, texts/, to a model that Ollama runs: docs/export.md says what each command does.
set -e

pip install "apt-kernel[gguf]"
apt-train -p base --data.train_path texts --data.tokenizer_name bpe --model.vocab_size 1024 --output runs/mine
apt-export runs/mine --to gguf --output mine-gguf
ollama create mine -f mine-gguf/Modelfile
