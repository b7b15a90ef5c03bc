#!/usr/bin/env bash
# The whole way in one readable chain: base model, training with CLP and experts, index, search, score, comparison.
# Needs neither a hub nor a GPU; `make quickstart` runs it in .venv. Everything it writes lies in quickstart/.
set -eu
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
LANGUAGES="ko fa hi en"
OUT=quickstart
SAMPLE=data/sample
rm -rf "$OUT" && mkdir -p "$OUT"

echo "== 1. A small real base model: the first 4 layers of multilingual-e5-small, vocabulary cut to the sample"
python -m FlagEmbedding.demo "$OUT/base" --layers 4 \
    --vocab_from $SAMPLE/miracl-corpus-v1.0-*/docs-*.jsonl.gz $SAMPLE/miracl-v1.0-*/topics/*.tsv

echo "== 2. Fine-tuning with the contrastive learning penalty and two experts a layer (configs/quickstart.yaml)"
python run.py configs/quickstart.yaml --model_name_or_path "$OUT/base" --train_data $SAMPLE/train --output_dir "$OUT/tuned"

for MODEL in base tuned; do
    echo "== 3. $MODEL: embed the corpora, search the dev queries"
    (cd evaluation
     python step0-generate_embedding.py --encoder "../$OUT/$MODEL" --languages $LANGUAGES --data_dir "../$SAMPLE" \
         --index_save_dir "../$OUT/corpus-index" --max_passage_length 256 --pooling_method mean --normalize_embeddings True \
         --query_instruction "query: " --passage_instruction "passage: "
     python step1-search_results.py --encoder "../$OUT/$MODEL" --languages $LANGUAGES --data_dir "../$SAMPLE" \
         --index_save_dir "../$OUT/corpus-index" --result_save_dir "../$OUT/search_results" --threads 2 --hits 100 \
         --pooling_method mean --normalize_embeddings True --query_instruction "query: ")
done

echo "== 4. Before and after"
(cd evaluation
 python step2-eval_dense_mldr.py --encoder "../$OUT/base" "../$OUT/tuned" --compare --languages $LANGUAGES \
     --search_result_save_dir "../$OUT/search_results" --qrels_dir "../$SAMPLE" --eval_result_save_dir "../$OUT/eval_results" \
     --metrics ndcg@5 ndcg@10 recall@20 --pooling_method mean --normalize_embeddings True)
