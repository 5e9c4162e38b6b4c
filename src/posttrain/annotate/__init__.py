"""People order responses on a page of their own; what they say becomes preference pairs and rankings to train on.

```
rows or models --items--> database --turns--> page --turns--> database --exports--> pairs, rankings, data set
                                                                 `--agreement--> how far the annotators are of one mind
```
"""
