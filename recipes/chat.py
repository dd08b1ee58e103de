"""Hold a conversation with a model in the terminal.

python recipes/chat.py model=runs/sft_tiny/hf
python recipes/chat.py model=runs/sft_tiny/hf temperature=0 < messages.txt > answers.txt

A line is a message; if it ends in a backslash, the message goes on in the next line. /reset forgets
the conversation, /system TEXT replaces the system prompt, and /exit or Ctrl-D ends the session.
Ctrl-C ends an answer, and at the prompt the session.
"""

import signal
import sys
from contextlib import suppress

from flame_composer.config.cli import listen_to_signals, run
from flame_composer.config.use import ChatConfig
from flame_composer.lines import write_content


def main(config: ChatConfig) -> None:
    import torch

    from flame_composer.checkpoint.to_model import load_model
    from flame_composer.use.chat import COMMANDS, Conversation, hold, read_messages

    listen_to_signals()  # importing Composer replaced the handlers
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # so that `| head` ends the script quietly
    model, tokenizer = load_model(config.model, base=config.base)
    conversation = Conversation(model, tokenizer, config)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    torch.manual_seed(config.seed)
    is_terminal = sys.stdin is not None and sys.stdin.isatty()
    if is_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  # lines can be edited, and earlier ones called back
        print(COMMANDS, file=sys.stderr)
    # From now on Ctrl-C may come any number of times, to cut answers short.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    hold(conversation, read_messages(), show=write_content)
    if is_terminal:
        write_content("\n")


if __name__ == "__main__":
    sys.exit(run(main, ChatConfig))
