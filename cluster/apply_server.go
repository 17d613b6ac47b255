package cluster

func (t *tx) registerServer(c *RegisterServer) *Error {
	if c.Server == nil || c.Server.ID == "" || c.Server.RaftAddr == "" {
		return Errorf(CodeInvalid, "a server needs an ID and a Raft address")
	}
	s := *c.Server
	s.CreateIndex, s.ModifyIndex = t.index, t.index
	if old := t.Server(nil, s.ID); old != nil {
		s.CreateIndex = old.CreateIndex
		same := *old
		if same.ModifyIndex = t.index; same == s {
			return nil
		}
	}
	t.put(TableServers, &s)
	return nil
}

// removeServer is silent about a server that it does not know: raft may have
// had a member that never registered.
func (t *tx) removeServer(c *RemoveServer) {
	old := t.Server(nil, c.ID)
	if old == nil {
		return
	}
	if !c.Left {
		t.delete(TableServers, old)
		return
	}
	s := *old
	s.Left, s.Start, s.ModifyIndex = true, c.Start, t.index
	t.put(TableServers, &s)
	var oldest *Server
	left := 0
	for _, s := range t.Servers(nil) {
		if !s.Left {
			continue
		}
		if left++; oldest == nil || s.ModifyIndex < oldest.ModifyIndex {
			oldest = s
		}
	}
	if left > MaxLeftServers {
		t.delete(TableServers, oldest)
	}
}

func (t *tx) setAutopilotConfig(c *SetAutopilotConfig) (Result, *Error) {
	if c.Config == nil || c.Config.LastContactThreshold < 0 || c.Config.ServerStabilizationTime < 0 {
		return Result{}, Errorf(CodeInvalid, "autopilot settings need times that are not negative")
	}
	old := first[AutopilotConfig](t.txn, nil, TableAutopilot, "id", "config")
	var current uint64
	if old != nil {
		current = old.ModifyIndex
	}
	if c.CheckIndex && c.Index != current {
		return Result{}, nil
	}
	cfg := *c.Config
	cfg.CreateIndex, cfg.ModifyIndex = t.index, t.index
	if old != nil {
		cfg.CreateIndex = old.CreateIndex
	}
	t.put(TableAutopilot, &cfg)
	return Result{Updated: true}, nil
}

func (t *tx) setClusterMeta(c *SetClusterMeta) *Error {
	if c.ClusterID == "" {
		return Errorf(CodeInvalid, "a cluster needs an ID")
	}
	if old := t.ClusterMeta(nil); old != nil {
		if old.ClusterID == c.ClusterID {
			return nil
		}
		return Errorf(CodeConflict, "this cluster is named %s already", old.ClusterID)
	}
	t.put(TableClusterMeta, &ClusterMeta{ClusterID: c.ClusterID, CreateTime: t.stamp.Time, CreateIndex: t.index, ModifyIndex: t.index})
	return nil
}

// OfMembership says whether a record, as Marshal writes it, belongs to what a
// restore leaves as it is: the servers and the cluster's name. An archive brings
// jobs, not other servers.
func OfMembership(t *Table, record []byte) bool {
	switch t.Name {
	case TableServers, TableClusterMeta:
		return true
	case TableIndex:
		var e IndexEntry
		return Unmarshal(record, &e) == nil && (e.Table == TableServers || e.Table == TableClusterMeta)
	}
	return false
}

// Membership calls fn for every record for which OfMembership is true, as a restore
// over this state keeps it: with a timeline of its own.
func (s *Snapshot) Membership(fn func(t *Table, record []byte) error) error {
	for _, server := range s.Servers(nil) {
		if err := fn(tableByName[TableServers], Marshal(server)); err != nil {
			return err
		}
	}
	next := s.Index(nil) + 1 // no index of this state, and at most that of the restore
	meta := s.ClusterMeta(nil)
	if meta != nil {
		m := *meta
		m.ModifyIndex = next
		if err := fn(tableByName[TableClusterMeta], Marshal(&m)); err != nil {
			return err
		}
	}
	for _, table := range []string{TableServers, TableClusterMeta} {
		index := s.Index(nil, table)
		if table == TableClusterMeta && meta != nil {
			index = next
		}
		if index > 0 {
			if err := fn(tableByName[TableIndex], Marshal(&IndexEntry{Table: table, Index: index})); err != nil {
				return err
			}
		}
	}
	return nil
}
