"""What a user wants read: text files, conversations of every format; and answers on a terminal."""
