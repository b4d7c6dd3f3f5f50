"""Supervised fine-tuning: only answers are supervised, packing does not leak, and the model learns."""

import json

import finetune_cases as cases
import models
import pytest
import torch
import transformers as hf

import peftkit.finetune
from peftkit import BottleneckConfig, ContractError, LoraConfig, PrefixConfig, load_base, wrap
from peftkit.finetune.generative import require_causal
from peftkit.finetune.packing import collate_packs, pack, require_no_leaks
from peftkit.finetune.tasks.base import BadRow, Setting
from peftkit.finetune.tasks.causal_lm import CausalLm
from peftkit.finetune.tasks.sft import Options, Sft


def task(chat=True, template=None, seq_len=64, **options):
    tokenizer = cases.letter_tokenizer(chat)
    if template is not None:
        tokenizer.chat_template = template
    return Sft(Setting(tokenizer, seq_len, Options(**options)))


def shown(task, row):
    (encoded,) = task.encode(row)
    return task.render(encoded.features)


TALK = {
    "messages": [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
        {"role": "user", "content": "bye"},
        {"role": "assistant", "content": "so long"},
    ]
}


def test_answers_alone_are_supervised():
    whole = "<u>hi</s><a>«yo</s>»<u>bye</s><a>«so long</s>»"
    assert shown(task(), TALK) == whole
    assert shown(task(train_on="last_answer"), TALK) == whole.replace("«yo</s>»", "yo</s>")
    assert (
        shown(task(train_on="everything"), TALK) == f"«{whole.replace('«', '').replace('»', '')}»"
    )
    assert shown(task(), {"prompt": "hi", "completion": "yo"}) == "<u>hi</s><a>«yo</s>»"
    share_gpt = {"messages": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}
    assert shown(task(), share_gpt) == "<u>hi</s><a>«yo</s>»"
    assert shown(task(), {"messages": json.dumps(TALK["messages"])}) == whole


def test_the_same_answer_twice_is_found_at_its_own_place():
    row = {"messages": [{"role": r, "content": "a"} for r in ("user", "assistant") * 2]}
    assert shown(task(), row) == "<u>a</s><a>«a</s>»<u>a</s><a>«a</s>»"


def test_without_a_template_the_end_is_learnt():
    plain = task(chat=False)
    (encoded,) = plain.encode({"prompt": "hi", "completion": "yo"})
    text = plain.render(encoded.features)
    assert text.endswith("«yo</s>»")
    with pytest.raises(BadRow, match="needs a chat template"):
        plain.encode(TALK)


def test_a_template_that_rewrites_earlier_turns_is_refused_or_trained_on_the_last_answer():
    # As templates of reasoning models do, an answer is written in short once another turn follows.
    template = (
        "{% for m in messages %}<{{ m['role'][0] }}>"
        "{% if m['role'] == 'assistant' and not loop.last %}...{% else %}{{ m['content'] }}{% endif %}</s>{% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}"
    )
    with pytest.raises(BadRow, match=r"set task\.train_on=last_answer"):
        task(template=template).encode(TALK)
    last = task(template=template, train_on="last_answer")
    assert shown(last, TALK) == "<u>hi</s><a>...</s><u>bye</s><a>«so long</s>»"


def test_a_template_that_refuses_a_role_makes_a_bad_row():
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + cases.CHAT_TEMPLATE
    )
    with pytest.raises(BadRow, match="the chat template refuses the conversation"):
        task(template=template, system="s").encode({"prompt": "hi", "completion": "yo"})


def test_prompts_end_where_the_answer_starts():
    sft = task(system="be short")
    ids, expected = sft.prompt(TALK)
    assert sft.setting.tokenizer.decode(ids) == "<s>be short</s><u>hi</s><a>yo</s><u>bye</s><a>"
    assert expected == "so long"
    assert sft.setting.tokenizer.decode(sft.prompt_of_text("hi")) == "<s>be short</s><u>hi</s><a>"


def packed_rows(seed=0):
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for length in (5, 9, 3, 7):
        ids = torch.randint(7, models.VOCAB_SIZE, (length,), generator=draw).tolist()
        rows.append({"input_ids": ids, "labels": list(ids)})
    return rows


def test_packs_hold_every_row_once_and_are_full():
    rows = packed_rows()
    packs = pack(rows, 12)
    assert [len(p["input_ids"]) for p in packs] == [12, 12]
    assert sorted(i for p in packs for i in p["input_ids"]) == sorted(
        i for r in rows for i in r["input_ids"]
    )
    assert sum(label == -100 for p in packs for label in p["labels"]) == len(rows)
    assert packs[0]["position_ids"].count(0) == 2


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_the_loss_of_packs_is_that_of_separate_rows(name):
    model = models.tiny(name).eval()
    require_no_leaks(model)
    rows = packed_rows()
    sums, count = torch.zeros(()), 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        logits = model(input_ids=ids).logits[0, :-1]
        sums = sums + torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        count += len(row["input_ids"]) - 1
    batch = collate_packs(pack(rows, 14), 0)
    found = model(**batch).loss
    # Both are means of the same float32 numbers; attention sums them in another order.
    assert found.item() == pytest.approx(
        (sums / count).item(), rel=64 * torch.finfo(torch.float32).eps
    )
    leaking = model(
        **batch | {"position_ids": torch.arange(batch["input_ids"].shape[1])[None].expand(2, -1)}
    ).loss
    assert abs(leaking - found) > 1e-3


ADAPTERS = {
    "lora": LoraConfig(r=4, lora_dropout=0.3, init_lora_weights=False),
    "prefix": PrefixConfig(num_virtual_tokens=4),
    "bottleneck": BottleneckConfig(reduction_factor=4),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_model_with_an_adapter_keeps_packed_rows_apart(adapter):
    require_no_leaks(wrap(models.tiny("llama"), ADAPTERS[adapter]))


def test_a_model_that_mixes_packed_rows_is_refused():
    config = hf.BloomConfig(vocab_size=models.VOCAB_SIZE, hidden_size=32, n_layer=1, n_head=4)
    with pytest.raises(ContractError, match="takes no position_ids"):
        require_no_leaks(hf.BloomForCausalLM(config))

    # OPT's positions do not reach its mask.
    with pytest.raises(ContractError, match="tokens of one row change the logits of the next"):
        require_no_leaks(models.tiny("opt"))


def test_long_texts_are_split_without_losing_a_token():
    causal = CausalLm(Setting(cases.letter_tokenizer(), 8, CausalLm.Options()))
    for length in range(1, 30):
        parts = causal.encode({"text": "abcdefghijklmnopqrstuvwxyzABCDEF"[:length]})
        ids = [i for part in parts for i in part.features["input_ids"]]
        assert (
            causal.setting.tokenizer.decode(ids)
            == "abcdefghijklmnopqrstuvwxyzABCDEF"[:length] + "</s>"
        )
        assert all(2 <= len(part.features["input_ids"]) <= 8 for part in parts)


@pytest.mark.parametrize("packing", [False, True])
def test_a_tiny_model_learns_to_repeat(packing, tmp_path, one_thread):
    model = cases.save_model(tmp_path / "m", "llama", chat=True)
    data = cases.write_jsonl(tmp_path / "d.jsonl", [c for c in cases.chats(4) for _ in range(8)])
    values = cases.recipe(
        model,
        {"name": "sft", "packing": packing},
        data,
        tmp_path / "run",
        strategy={"name": "lora", "r": 16},
        data={"eval": 0.25},
        training={
            "max_steps": 60,
            "batch_size": 8 if not packing else 2,
            "lr": 2e-2,
            "checkpoint_every": 20,
        },
    )
    printed = cases.run("train", cases.write_recipe(tmp_path / "r.yaml", values))
    assert "28 of 28 trained tensors changed" in (tmp_path / "run" / "report.md").read_text()
    found = json.loads(cases.run("eval", tmp_path / "run", "--json"))
    assert found["token_accuracy"] > 0.95, printed
    answers = json.loads(cases.run("generate", tmp_path / "run", "say a", "say c", "--json"))
    assert answers == [{"prompt": "say a", "answer": "aaa"}, {"prompt": "say c", "answer": "ccc"}]
    samples = json.loads((tmp_path / "run" / "samples.json").read_text())
    assert all(s["after"] == s["expected"] != s["before"] for s in samples)
    assert peftkit.finetune.generate(tmp_path / "run", ["say b"]) == ["bbb"]


def test_causal_lm_runs_on_a_folder_of_texts(tmp_path, one_thread):
    model = cases.save_model(tmp_path / "m", "gpt2")
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("the cat sat on the mat. " * 30)
    (folder / "b.txt").write_text("a dog\n\na bird")
    values = cases.recipe(
        model,
        "causal_lm",
        str(folder),
        tmp_path / "run",
        data={"eval": 0.4},
        training={"seq_len": 32},
    )
    cases.run("train", cases.write_recipe(tmp_path / "r.yaml", values))
    facts = json.loads((tmp_path / "run" / "data.json").read_text())
    assert facts["train"]["truncated"] == 0
    assert "loss" in json.loads(cases.run("eval", tmp_path / "run", "--json"))
    assert "loss: " in cases.run("eval", tmp_path / "run", "--data", folder / "b.txt")


def save_with_outliers(folder):
    """The tiny Llama with inputs of its linears beyond bitsandbytes' threshold for outliers, as those of real models are."""
    model = models.tiny("llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter.mul_(2.5)
    model.save_pretrained(folder)
    cases.letter_tokenizer(True).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("int8_mode", [None, "compute", "weight-only"])
def test_outliers_of_an_int8_base_are_not_taken_for_attention(
    int8_mode, packing, tmp_path, one_thread
):
    pytest.importorskip("bitsandbytes")
    folder = save_with_outliers(tmp_path / "m")
    model = wrap(
        load_base(folder, base="int8"), LoraConfig(target_modules="all-linear"), int8_mode=int8_mode
    )
    ids = torch.arange(8)[None]
    other = ids.clone()
    other[0, -1] = 0
    with torch.no_grad():
        rows = [model.eval()(input_ids=i).logits[0, :-1] for i in (ids, other)]
    # Whatever the tokens attend to, the last one decides which columns are in 16 bits.
    assert torch.equal(*rows) == (int8_mode == "weight-only")
    (require_no_leaks if packing else require_causal)(model)
    with torch.no_grad():
        again = model.eval()(input_ids=ids).logits[0, :-1]
    assert torch.equal(again, rows[0])


def test_an_int8_base_with_outliers_is_trained(tmp_path, one_thread):
    pytest.importorskip("bitsandbytes")
    model = save_with_outliers(tmp_path / "m")
    task = {"name": "sft", "packing": True}
    found = peftkit.finetune.train(
        cases.recipe(model, task, cases.chats(8), tmp_path / "run", base="int8")
    )
    assert (found.status, found.problems) == ("finished", [])
