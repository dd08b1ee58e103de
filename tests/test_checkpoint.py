def test_x(trained):
    import json
    print((trained.log_folder/"train_log.jsonl").read_text(), sorted(trained.checkpoints.iterdir()))
