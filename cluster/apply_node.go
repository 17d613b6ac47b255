package cluster

// MaxNodes bounds how many nodes a region holds.
const MaxNodes = 100_000

func (t *tx) registerNode(c *RegisterNode) *Error {
	n := c.Node
	if n == nil || n.ID == "" || n.Name == "" || n.NodeResources == nil {
		return Errorf(CodeInvalid, "node registration lacks an ID, a name or resources")
	}
	if c.KeyHash != "" {
		if err := t.EnrolledAs(n.ID, n.Name, c.KeyHash); err != nil {
			return err
		}
	}
	old := t.Node(nil, n.ID)
	if old != nil && n.Revision != 0 && n.Revision < old.Revision {
		return nil // it was held up, and the node has said something newer since
	}
	t.present(n.ID)
	if n.ReservedResources == nil {
		n.ReservedResources = &NodeReservedResources{}
	}
	if n.Status == "" {
		n.Status = NodeStatusReady
	}
	n.CreateIndex, n.StatusUpdatedAt = t.index, t.stamp.Time/1e9
	if n.SchedulingEligibility == "" {
		n.SchedulingEligibility = NodeEligible
	}
	n.DeviceOrders = nil
	if t.stamp.Rules < rulesEngine {
		n.Interruption = nil
	}
	if old == nil {
		n.Events = nil
		t.nodeEvent(n, "Node registered", nil)
		if n.Interruption != nil {
			t.interrupt(n, n.Interruption.Reason, n.Interruption.At, nil)
		}
		t.putNode(n)
		t.evalSystem([]*Node{n})
		return nil
	}
	n.CreateIndex, n.Events = old.CreateIndex, old.Events
	n.SchedulingEligibility, n.Drain = old.SchedulingEligibility, old.Drain
	n.DrainStrategy, n.LastDrain = old.DrainStrategy, old.LastDrain
	if old.Status == n.Status {
		n.StatusUpdatedAt = old.StatusUpdatedAt
	} else {
		t.nodeEvent(n, "Node reregistered", nil)
	}
	if t.stamp.Rules < rulesEngine {
		t.putNode(n)
	} else {
		n.DeviceOrders = old.DeviceOrders
		drained := t.heed(old, n)
		obey(n)
		t.judgeDevices(old, n)
		if drained {
			t.evalNode(n, TriggerNodeDrain)
		}
	}
	if old.Status != n.Status {
		// Only of what was given up is there something to decide: the rest runs on, and
		// a thousand nodes may come back at once.
		var keys []JobKey
		for _, a := range t.AllocsByNode(nil, n.ID) {
			if a.ClientStatus == AllocClientUnknown && !a.ServerTerminal() || t.stamp.Rules < rulesSparse && !a.Terminal() {
				keys = append(keys, a.JobKey())
			}
		}
		t.evalJobs(keys, TriggerNodeUpdate, func(e *Evaluation) {
			e.NodeID, e.NodeModifyIndex = n.ID, t.index
		})
	}
	if old.Status != n.Status || len(t.PerNodeJobs(nil)) > 0 && !alike(old, n) {
		t.evalSystem([]*Node{n})
	}
	return nil
}

func (t *tx) putNode(n *Node) {
	n.ModifyIndex = t.index
	t.put(TableNodes, n)
	t.touch(IndexCapacity)
}

func (t *tx) nodeEvent(n *Node, message string, details map[string]string) {
	events := append([]*NodeEvent(nil), n.Events...)
	events = append(events, &NodeEvent{
		Message: message, Subsystem: "Cluster", Details: details,
		Timestamp: Time(t.stamp.Time), CreateIndex: t.index,
	})
	if len(events) > MaxNodeEvents {
		events = events[len(events)-MaxNodeEvents:]
	}
	n.Events = events
}

// evalNode evaluates every job with live work on the node. When the node is lost
// that includes work that was asked to stop, and work of purged jobs: nobody else
// will say that it has ended.
func (t *tx) evalNode(n *Node, trigger string) {
	t.evalNodes([]*Node{n}, trigger)
}

// evalNodes is evalNode for several at once: a job with work on many of them is
// evaluated once, for the first. While replacements pause that only shows the reason,
// for which one open evaluation of a job will do; the end of the pause makes another.
func (t *tx) evalNodes(nodes []*Node, trigger string) {
	held := t.stamp.Rules >= rulesSparse && t.FleetHold(nil) != nil
	seen := map[JobKey]bool{}
	for _, n := range nodes {
		if t.stamp.Rules < rulesSparse {
			clear(seen)
		}
		lost := n.Silent() || t.Node(nil, n.ID) == nil
		var keys []JobKey
		for _, a := range t.AllocsByNode(nil, n.ID) {
			if k := a.JobKey(); !seen[k] && (!a.Terminal() || lost && !a.ClientTerminal()) {
				seen[k] = true
				if !held || n.Status != NodeStatusDisconnected || !t.evaluates(k) {
					keys = append(keys, k)
				}
			}
		}
		t.evalJobs(keys, trigger, func(e *Evaluation) {
			e.NodeID, e.NodeModifyIndex = n.ID, t.index
		})
	}
}

// evaluates says whether an evaluation of the job is open.
func (t *tx) evaluates(k JobKey) bool {
	return len(t.OpenEvalsByJob(k)) > 0
}

func (t *tx) updateNodeStatus(c *UpdateNodeStatus) {
	var changed []*Node
	for _, u := range c.Updates {
		old := t.Node(nil, u.NodeID)
		if old == nil || old.Status == u.Status || (u.Index != 0 && u.Index != old.ModifyIndex) {
			continue
		}
		status := u.Status
		if status == NodeStatusDown && t.awaited(old) {
			status = NodeStatusDisconnected
		}
		if status != old.Status {
			changed = append(changed, t.setNodeStatus(old, status, u.Message))
		}
	}
	t.evalNodes(changed, TriggerNodeUpdate)
	t.evalSystem(changed)
}

func (t *tx) setNodeStatus(old *Node, status, message string) *Node {
	n := *old
	n.Status, n.StatusDescription, n.StatusUpdatedAt = status, message, t.stamp.Time/1e9
	if message == "" {
		message = "Node is " + status
	}
	t.nodeEvent(&n, message, nil)
	t.putNode(&n)
	return &n
}

// awaited says whether something on a silent node may still come back: its group
// has a disconnect block whose lost_after has not passed.
func (t *tx) awaited(n *Node) bool { return t.Awaited(n, Time(t.stamp.Time)) }

// Awaited says whether a node that is silent counts as disconnected, not down:
// something that ran there has a disconnect block whose lost_after has not passed.
func (s *Snapshot) Awaited(n *Node, now Time) bool {
	for _, a := range s.AllocsHolding(nil, n.ID) {
		if a.ServerTerminal() || (a.ClientStatus != AllocClientRunning && a.ClientStatus != AllocClientUnknown) {
			continue
		}
		j := s.JobVersion(nil, a.JobKey(), a.JobVersion)
		if j == nil {
			continue
		}
		if g := j.Group(a.TaskGroup); g == nil || g.Disconnect == nil || g.Disconnect.LostAfter == 0 {
			continue
		} else if a.UnknownSince == 0 || a.UnknownSince.Add(g.Disconnect.LostAfter) > now {
			return true
		}
	}
	return false
}

func (t *tx) updateEligibility(c *UpdateEligibility) *Error {
	old := t.Node(nil, c.NodeID)
	if old == nil {
		return Errorf(CodeNotFound, "node not found")
	}
	if c.Eligibility != NodeEligible && c.Eligibility != NodeIneligible {
		return Errorf(CodeInvalid, "invalid scheduling eligibility %q: use %s or %s", c.Eligibility, NodeEligible, NodeIneligible)
	}
	if old.Drain && c.Eligibility == NodeEligible {
		return Errorf(CodeConflict, "can not set node's scheduling eligibility to eligible while it is draining")
	}
	if old.SchedulingEligibility == c.Eligibility {
		return nil
	}
	n := *old
	n.SchedulingEligibility = c.Eligibility
	t.nodeEvent(&n, "Node marked as "+c.Eligibility+" for scheduling", nil)
	t.putNode(&n)
	t.evalSystem([]*Node{&n})
	return nil
}

func (t *tx) updateDrain(c *UpdateDrain) *Error {
	old := t.Node(nil, c.NodeID)
	if old == nil {
		return Errorf(CodeNotFound, "node not found")
	}
	n := *old
	now := Time(t.stamp.Time)
	last := &DrainMetadata{StartedAt: now, UpdatedAt: now, Status: "draining", Meta: c.Meta}
	if old.LastDrain != nil && old.Drain {
		last.StartedAt = old.LastDrain.StartedAt
		if c.Meta == nil {
			last.Meta = old.LastDrain.Meta
		}
	}
	switch {
	case c.Strategy != nil && c.Strategy.Interrupted:
		t.interrupt(&n, c.Meta[InterruptedBy], now.Add(c.Strategy.Deadline), c.Meta)
		last = n.LastDrain
	case c.Strategy != nil:
		s := *c.Strategy
		s.StartedAt = now
		if s.Deadline > 0 {
			s.ForceDeadline = now.Add(s.Deadline)
		}
		n.Drain, n.DrainStrategy, n.SchedulingEligibility = true, &s, NodeIneligible
		t.nodeEvent(&n, "Node drain strategy set", nil)
	case !old.Drain:
		if c.MarkEligible && old.SchedulingEligibility != NodeEligible {
			n.SchedulingEligibility = NodeEligible
			t.nodeEvent(&n, "Node marked as eligible for scheduling", nil)
			t.putNode(&n)
			t.evalSystem([]*Node{&n})
		}
		return nil
	case c.Complete:
		last.Status = "complete"
		n.Drain, n.DrainStrategy = false, nil
		t.nodeEvent(&n, "Node drain complete", nil)
	default:
		last.Status = "canceled"
		n.Drain, n.DrainStrategy = false, nil
		if c.MarkEligible {
			n.SchedulingEligibility = NodeEligible
		}
		t.nodeEvent(&n, "Node drain canceled", nil)
	}
	n.LastDrain = last
	t.putNode(&n)
	t.evalNode(&n, TriggerNodeDrain)
	t.evalSystem([]*Node{&n})
	return nil
}

func (t *tx) deregisterNode(c *DeregisterNode) *Error {
	n := t.Node(nil, c.NodeID)
	if n == nil {
		return Errorf(CodeNotFound, "node not found")
	}
	t.delete(TableNodes, n)
	t.expel(n.ID)
	t.evalNode(n, TriggerNodeUpdate)
	return nil
}
