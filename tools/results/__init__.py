"""Raw results as small files in results/, and the pages' tables made from them."""
