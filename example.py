"""Two questions to a chat model: `python example.py [--model PATH_OR_NAME]`.

Several processes share it with `--tensor-parallel-size N`, or with torchrun (docs/parallel.md).
"""

import argparse
import os
import time

from nanovllm import LLM, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="directory, .gguf file, Hub repository or alias")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--tensor-parallel-size", type=int, help="ranks; with torchrun its number of processes")
    parser.add_argument("--executor", default="auto", choices=("auto", "mp", "torchrun"))
    args = parser.parse_args()
    first = int(os.environ.get("RANK", "0")) == 0  # torchrun starts this script once for each rank

    with LLM(args.model, tensor_parallel_size=args.tensor_parallel_size, executor=args.executor) as llm:
        tokenizer = llm.get_tokenizer()
        questions = ["introduce yourself", "What are the benefits of reading books?"]
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            )
            for question in questions
        ]
        sampling_params = SamplingParams(temperature=0.2, top_p=0.9, max_tokens=args.max_tokens, seed=0)
        start = time.perf_counter()
        outputs = llm.generate(prompts, sampling_params, use_tqdm=first)
        seconds = time.perf_counter() - start
    if not first:
        return
    for prompt, output in zip(prompts, outputs, strict=True):
        print(f"\nPrompt: {prompt!r}\nCompletion: {output['text']!r}")
    count = sum(len(output["token_ids"]) for output in outputs)
    print(f"\n{count} tokens in {seconds:.2f} s: {count / seconds:.0f} tok/s")


if __name__ == "__main__":
    main()
