"""Small random-weight models of every structure that graphopt claims, built in code, exported once and cached."""
