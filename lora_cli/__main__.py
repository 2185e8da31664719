from lora_cli.cli.main import main

main()
