"""What the tiny models of the page's tests say."""

from __future__ import annotations

ATTENTION = """\
**Gated linear attention** reads a text token by token and keeps what it read in a state of \
fixed size. At each token it does three things:

1. **Forget**: every row of the state fades by a gate in (0, 1).
2. **Write**: the outer product of key and value is added.
3. **Read**: the query picks from the state what comes out.

In a formula, `S = diag(g) S + k v^T` and `o = S^T q`."""
CODE = """\
In plain PyTorch, one token of one head is this:

```python
def step(state, q, k, v, gate):
    \"\"\"Read one token; state is [keys, values].\"\"\"
    state = gate[:, None] * state + torch.outer(k, v)
    return state, state.T @ q
```

| | after 1,000 tokens | after 32,000 |
|---|---|---|
| attention | a cache of 1,000 rows | 32,000 rows |
| GLA | one state | **the same state** |

More is in [the paper](https://arxiv.org/abs/2312.06635)."""
CHINESE = """\
它把读过的内容保存在**固定大小**的状态里：

- 每个词元先按门控衰减状态；
- 再写入新的键和值。

> 因此，文本再长，每个词元的用时也不变。"""
HOSTILE = """\
<script>document.title = "run"</script><img src=x onerror="document.title='run'">

# <b onclick=alert(1)>Title</b>

[press](javascript:document.title='run') and [here](data:text/html,<script>1</script>)

![picture](http://127.0.0.1:9/seen.png) or <iframe src="http://127.0.0.1:9/"></iframe>

- <svg/onload=document.title='run'>
- [good](https://example.org/a?b=1&c="d")

```html"><img src=x onerror=document.title='run'>
</code></pre><script>document.title = "run"</script>
```"""
TALK = [
    ["What is gated linear attention?", ATTENTION, "Show me one token in code.", CODE],
    ["门控线性注意力是什么？", CHINESE],
    ["Be hostile.", HOSTILE],
]
