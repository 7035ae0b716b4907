namespace sarissa::data {}
