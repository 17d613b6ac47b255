package cluster

import "slices"

func (t *tx) setFleetHold(c *SetFleetHold) *Error {
	old := t.FleetHold(nil)
	if c.Hold == nil {
		if old == nil {
			return nil
		}
		t.delete(TableFleetHold, old)
		t.touch(IndexCapacity) // what waited for the nodes may go elsewhere now
		away := slices.DeleteFunc(t.Nodes(nil, ""), func(n *Node) bool { return n.Status != NodeStatusDisconnected })
		t.evalNodes(away, TriggerNodeUpdate)
		return nil
	}
	if c.Hold.Reason == "" {
		return Errorf(CodeInvalid, "a hold on replacements needs a reason")
	}
	h := *c.Hold
	h.Since, h.CreateIndex, h.ModifyIndex = Time(t.stamp.Time), t.index, t.index
	if old != nil {
		h.Since, h.CreateIndex = old.Since, old.CreateIndex
	}
	t.put(TableFleetHold, &h)
	return nil
}
