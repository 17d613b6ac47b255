package cluster

// Apply applies the log entry at index. The Result's Err is the user's error; an
// error from Apply itself means that the entry cannot be understood and the
// server must stop.
func (s *State) Apply(index uint64, entry []byte) (Result, error) { panic("written next") }

// Check walks the whole state and reports every broken invariant.
func (s *Snapshot) Check() error { panic("written next") }
