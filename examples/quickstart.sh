#!/usr/bin/env bash
# The whole way in one readable chain: base model, training with CLP and experts, index, search, score, comparison.
# Needs neither a hub nor a GPU; `make quickstart` runs it in .venv. Everything it writes lies in quickstart/.
set -eu
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
LANGUAGES="ko fa hi en"
SAMPLE=$PWD/data/sample
OUT=$PWD/quickstart
MODEL_OPTIONS="--pooling_method mean --normalize_embeddings True"
rm -rf "$OUT" && mkdir -p "$OUT"

echo "== 1. A small real base model: the first 4 layers of multilingual-e5-small, vocabulary cut to the sample"
python -m FlagEmbedding.demo "$OUT/base" --layers 4 \
    --vocab_from "$SAMPLE"/miracl-corpus-v1.0-*/docs-*.jsonl.gz "$SAMPLE"/miracl-v1.0-*/topics/*.tsv

echo "== 2. Fine-tuning with the contrastive learning penalty and two experts a layer (configs/quickstart.yaml)"
python run.py configs/quickstart.yaml --model_name_or_path "$OUT/base" --train_data "$SAMPLE/train" --output_dir "$OUT/tuned"

cd evaluation
for MODEL in base tuned; do
    echo "== 3. $MODEL: embed the corpora, search them with the dev queries"
    python step0-generate_embedding.py --encoder "$OUT/$MODEL" --languages $LANGUAGES --data_dir "$SAMPLE" $MODEL_OPTIONS \
        --index_save_dir "$OUT/corpus-index" --max_passage_length 256 --passage_instruction_for_retrieval "passage: "
    python step1-search_results.py --encoder "$OUT/$MODEL" --languages $LANGUAGES --data_dir "$SAMPLE" $MODEL_OPTIONS \
        --index_save_dir "$OUT/corpus-index" --result_save_dir "$OUT/search_results" --threads 2 --hits 100 \
        --add_instruction True --query_instruction_for_retrieval "query: "
done

echo "== 4. Before and after"
python step2-eval_dense_mldr.py --encoder "$OUT/base" "$OUT/tuned" --compare --languages $LANGUAGES --data_dir "$SAMPLE" \
    $MODEL_OPTIONS --search_result_save_dir "$OUT/search_results" --index_save_dir "$OUT/corpus-index" \
    --eval_result_save_dir "$OUT/eval_results" --metrics ndcg@5 ndcg@10 recall@20
