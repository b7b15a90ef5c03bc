#!/usr/bin/env bash
# From raw topics, judgements and corpus to checked training files: hard negatives, their queries, the doctor's report.
# Needs neither a hub nor a GPU; `make data-demo` runs it in .venv. Everything it writes lies in runs/data-demo/.
#
# Negatives that are nobody's positive need a language model. Name one and the demo uses it:
#     LOCAL_MODEL=folder-or-hub-id make data-demo                      (through transformers)
#     BASE_URL=http://localhost:8000/v1 MODEL=name make data-demo      (any OpenAI-style endpoint; key in OPENAI_API_KEY)
set -eu
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" TOKENIZERS_PARALLELISM=false
LANGUAGES="ko fa hi"
SAMPLE=data/sample
OUT=runs/data-demo
rm -rf "$OUT" && mkdir -p "$OUT"

if [ -n "${LOCAL_MODEL:-}" ]; then
    WRITER=(--local_model "$LOCAL_MODEL")
elif [ -n "${MODEL:-}" ]; then
    WRITER=(--model "$MODEL" ${BASE_URL:+--base_url "$BASE_URL"})
else
    WRITER=()
fi

echo "== 0. A small real base model: the first 4 layers of multilingual-e5-small, vocabulary cut to the sample"
python -m FlagEmbedding.demo "$OUT/base" --layers 4 \
    --vocab_from "$SAMPLE"/miracl-corpus-v1.0-*/docs-*.jsonl.gz "$SAMPLE"/miracl-v1.0-*/topics/*.tsv
ENCODER=(--encoder "$OUT/base" --pooling_method mean --query_instruction_for_retrieval "query: "
         --passage_instruction_for_retrieval "passage: ")

for LANG_CODE in $LANGUAGES; do
    echo "== 1. $LANG_CODE: hard negatives for the train topics, out of the whole corpus (ANCE)"
    python -m FlagEmbedding.mining hard_negatives --data_dir "$SAMPLE" --language "$LANG_CODE" --split train \
        "${ENCODER[@]}" --range_for_sampling 0-20 --negative_number 7 --relative_margin 0 \
        --index_save_dir "$OUT/corpus-index" --output_file "$OUT/mined/$LANG_CODE.jsonl"

    echo "== 2. $LANG_CODE: queries for the negatives: real ones first, then a language model's where one is named"
    if [ ${#WRITER[@]} -gt 0 ]; then
        python -m FlagEmbedding.mining query_generation --input_file "$OUT/mined/$LANG_CODE.jsonl" \
            --output_file "$OUT/train/${LANG_CODE}_CLPL_train_data.jsonl" "${WRITER[@]}" --language "$LANG_CODE" \
            "${ENCODER[@]}" --round_trip_top_k 10 --corpus "$SAMPLE/miracl-corpus-v1.0-$LANG_CODE" \
            --index_dir "$OUT/corpus-index/base/$LANG_CODE"
    else
        python -m FlagEmbedding.mining query_generation --input_file "$OUT/mined/$LANG_CODE.jsonl" \
            --output_file "$OUT/train/${LANG_CODE}_CLPL_train_data.jsonl"
        echo "-- what a language model would have to do for the rest:"
        python -m FlagEmbedding.mining query_generation --input_file "$OUT/mined/$LANG_CODE.jsonl" \
            --output_file "$OUT/not-written.jsonl" --model any-model --base_url http://localhost --dry_run
    fi
done

echo "== 3. The doctor's report on all of it: $OUT/train/reports/doctor/report.md"
python -m FlagEmbedding.mining doctor "$OUT/train" --model "$OUT/base" --pooling_method mean \
    --query_instruction_for_retrieval "query: " --passage_instruction_for_retrieval "passage: "
python -m FlagEmbedding.mining check_data "$OUT/train"
