"""Answers that are kept as they come."""

from demo.answers import Answers


def test_answers_are_read_again_and_a_torn_line_is_left_out(tmp_path):
    path = tmp_path / "phases" / "base.answers.jsonl"
    answers = Answers(path)
    answers.add({3: [5, 6]})
    answers.add({0: [], 7: [1]})
    path.write_bytes(path.read_bytes() + b"[9, [1, 2")
    again = Answers(path)
    assert again.known == {3: [5, 6], 0: [], 7: [1]}
    again.add({9: [4]})
    assert Answers(path).known == {3: [5, 6], 0: [], 7: [1], 9: [4]}
