package cluster

// FleetHold is why the servers replace nothing for now: more nodes fell silent at
// once than die at once, so that the fault is more likely between them and the
// servers than in them. While it stands, silent nodes are disconnected instead of
// down, and what runs there is neither lost nor replaced.
type FleetHold struct {
	Since       Time
	Nodes       int    // silent nodes when it was set
	Of          int    // nodes that were ready before they fell silent
	Reason      string // one sentence for the operator
	CreateIndex uint64
	ModifyIndex uint64
}

// SetFleetHold sets the hold, or ends it when Hold is nil. Setting it again
// keeps Since. Its end evaluates every job with live work on a disconnected node.
type SetFleetHold struct {
	Stamp
	Hold *FleetHold
}

func (*SetFleetHold) kind() Kind { return KindSetFleetHold }

// FleetHold returns the hold on replacements, nil when there is none.
func (s *Snapshot) FleetHold(ws WatchSet) *FleetHold {
	return first[FleetHold](s.txn, ws, TableFleetHold, "id", "hold")
}
