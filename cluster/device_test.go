package cluster

import (
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

// randomDevice says something of a node's first device, or orders something of it.
func randomDevice(r *rand.Rand, n *Node) Command {
	device := n.NodeResources.Devices[0].Instances[0]
	switch r.IntN(4) {
	case 0:
		return &OrderDevice{NodeID: n.ID, DeviceID: device.ID}
	case 1:
		return &OrderDevice{NodeID: n.ID, DeviceID: device.ID, Order: &DeviceOrder{Order: []string{DeviceCordon, DeviceTrust}[r.IntN(2)], Move: r.IntN(2) == 0}}
	case 2:
		return &RegisterNode{Node: saying(n, []string{"", "XID 79", "XID 48"}[r.IntN(3)])}
	}
	c := saying(n, "")
	if r.IntN(2) == 0 {
		c.Interruption = &Interruption{Reason: "spot", At: Time(1e18 + r.Int64N(1e13))}
	}
	return &RegisterNode{Node: c}
}

// saying is the node's own word with its first device unhealthy for this reason; "": healthy.
func saying(n *Node, reason string) *Node {
	c := *n
	c.NodeResources = cloneDevices(n.NodeResources)
	d := c.NodeResources.Devices[0].Instances[0]
	d.Healthy, d.HealthDescription = reason == "", reason
	return &c
}

// TestUnhealthyDevice: work on exactly that device is evaluated, once; the events tell.
func TestUnhealthyDevice(t *testing.T) {
	h := newHarness(t)
	n := testNode(h.id())
	h.must(&RegisterNode{Node: n})
	devices := n.NodeResources.Devices[0].Instances
	h.place(testJob("on-it", 1), n, nil, devices[0].ID)
	h.place(testJob("beside-it", 1), n, nil, devices[1].ID)
	h.place(testJob("without", 1), n, nil)
	before := len(h.Snapshot().Evals(nil, ""))
	evaluated := func() (jobs []string) {
		all := h.Snapshot().Evals(nil, "")
		slices.SortFunc(all, func(a, b *Evaluation) int { return int(a.CreateIndex) - int(b.CreateIndex) })
		for _, e := range all[before:] {
			jobs = append(jobs, e.JobID)
		}
		before = len(all)
		return jobs
	}
	node := func() *Node { return h.Snapshot().Node(nil, n.ID) }

	h.must(&RegisterNode{Node: saying(n, "XID 79: gone")})
	if got := evaluated(); len(got) != 1 || got[0] != "on-it" {
		t.Fatalf("evaluated: %v, want the job on the device alone", got)
	}
	d := node().Device(devices[0].ID)
	if d.UnhealthySince != Time(h.now) || !strings.Contains(node().Events[len(node().Events)-1].Message, "is unhealthy: XID 79: gone") {
		t.Fatalf("the device is %+v, events %+v", d, node().Events[len(node().Events)-1])
	}
	since := d.UnhealthySince
	h.must(&RegisterNode{Node: saying(n, "XID 79: gone")})
	if got := evaluated(); got != nil || node().Device(devices[0].ID).UnhealthySince != since {
		t.Fatalf("said again it is news: %v", got)
	}
	h.must(&RegisterNode{Node: saying(n, "")})
	if d := node().Device(devices[0].ID); !d.Healthy || d.UnhealthySince != 0 || evaluated() != nil {
		t.Fatalf("healed it is %+v", d)
	}
	gone := saying(n, "")
	gone.NodeResources.Devices[0].Instances = gone.NodeResources.Devices[0].Instances[1:]
	h.must(&RegisterNode{Node: gone})
	if got := evaluated(); len(got) != 1 || got[0] != "on-it" {
		t.Fatalf("evaluated after the device has gone: %v", got)
	}
}

// TestDeviceOrders: an operator's word stands against the node's, over its registrations.
func TestDeviceOrders(t *testing.T) {
	h := newHarness(t)
	n := testNode(h.id())
	h.must(&RegisterNode{Node: n})
	id := n.NodeResources.Devices[0].Instances[0].ID
	h.place(testJob("on-it", 1), n, nil, id)
	evals := func() int { return len(h.Snapshot().Evals(nil, "")) }
	wants := func(step string, healthy bool, reason string, orders int) {
		t.Helper()
		now := h.Snapshot().Node(nil, n.ID)
		d := now.Device(id)
		if d.Healthy != healthy || d.HealthDescription != reason || len(now.DeviceOrders) != orders {
			t.Fatalf("%s: the device is %+v, orders %+v", step, d, now.DeviceOrders)
		}
	}
	order := func(o *DeviceOrder) { h.must(&OrderDevice{NodeID: n.ID, DeviceID: id, Order: o}) }
	say := func(reason string) { h.must(&RegisterNode{Node: saying(n, reason)}) }

	before := evals()
	order(&DeviceOrder{Order: DeviceCordon, Reason: "fan"})
	wants("cordoned", false, "cordoned by an operator: fan", 1)
	if evals() != before || h.Snapshot().Node(nil, n.ID).Unfit(id) != "" {
		t.Fatal("a cordon alone moves work")
	}
	say("")
	wants("registered anew", false, "cordoned by an operator: fan", 1)
	say("XID 48")
	if evals() != before+1 {
		t.Fatal("work stays on a cordoned device that breaks")
	}
	order(nil)
	wants("uncordoned while unhealthy", false, "XID 48", 0)
	order(&DeviceOrder{Order: DeviceTrust})
	wants("trusted", true, "", 1)
	say("XID 48")
	wants("trusted, and said again", true, "", 1)
	say("XID 79")
	wants("something new", false, "XID 79", 0)
	order(&DeviceOrder{Order: DeviceTrust})
	say("")
	wants("healed", true, "", 0)
	before = evals()
	order(&DeviceOrder{Order: DeviceCordon, Move: true})
	wants("emptied", false, "cordoned by an operator", 1)
	if evals() != before+1 {
		t.Fatal("a cordon that is to move work evaluates nothing")
	}
	order(nil)
	wants("given back", true, "", 0)

	// A word about one device changes nothing about another.
	other := n.NodeResources.Devices[0].Instances[1].ID
	order(&DeviceOrder{Order: DeviceCordon})
	h.must(&OrderDevice{NodeID: n.ID, DeviceID: other, Order: &DeviceOrder{Order: DeviceCordon}})
	h.must(&OrderDevice{NodeID: n.ID, DeviceID: other})
	wants("another was cordoned and given back", false, "cordoned by an operator", 1)
	order(nil)
	wants("given back after that", true, "", 0)

	for _, c := range []*OrderDevice{
		{NodeID: "nobody", DeviceID: id}, {NodeID: n.ID, DeviceID: "GPU-x"}, {NodeID: n.ID, DeviceID: id, Order: &DeviceOrder{Order: "love"}},
	} {
		if res := h.do(c); res.Err == nil {
			t.Errorf("%+v is accepted", c)
		}
	}
}

// TestInterruption: a notice drains the node in the same entry, once; the time that is left is
// halved for tasks to end in; a withdrawn one ends the drain that it began.
func TestInterruption(t *testing.T) {
	h := newHarness(t)
	n := testNode(h.id())
	h.must(&RegisterNode{Node: n})
	h.place(testJob("a", 1), n, nil)
	node := func() *Node { return h.Snapshot().Node(nil, n.ID) }
	say := func(i *Interruption) {
		c := saying(n, "")
		c.Interruption = i
		h.must(&RegisterNode{Node: c})
	}
	before := len(h.Snapshot().Evals(nil, ""))
	at := Time(h.now).Add(2*time.Minute + time.Second)
	say(&Interruption{Reason: "AWS spot: terminate", At: at})
	s := node().DrainStrategy
	if !node().Drain || node().SchedulingEligibility != NodeIneligible || !s.Interrupted || s.Deadline != time.Minute || s.ForceDeadline != Time(h.now).Add(time.Minute) {
		t.Fatalf("interrupted node: %+v, strategy %+v", node(), s)
	}
	if e := node().Events[len(node().Events)-1]; e.Message != "Node is to be interrupted: AWS spot: terminate" || e.Details["at"] == "" {
		t.Fatalf("event: %+v", e)
	}
	if len(h.Snapshot().Evals(nil, "")) != before+1 {
		t.Fatal("the job is not evaluated")
	}
	h.must(&UpdateDrain{NodeID: n.ID, MarkEligible: true}) // the operator thinks otherwise
	say(&Interruption{Reason: "AWS spot: terminate", At: at})
	if node().Drain {
		t.Fatal("the same notice drains again")
	}
	say(&Interruption{Reason: "AWS spot: rebalance"})
	if s := node().DrainStrategy; s == nil || s.Interrupted || s.ForceDeadline != 0 {
		t.Fatalf("a recommendation makes the strategy %+v", s)
	}
	say(nil)
	if node().Drain || node().SchedulingEligibility != NodeEligible || node().LastDrain.Status != "canceled" {
		t.Fatalf("after the notice is withdrawn: %+v", node())
	}
	h.must(&UpdateDrain{NodeID: n.ID, Strategy: &DrainStrategy{Deadline: time.Minute, Interrupted: true}, Meta: map[string]string{InterruptedBy: "by hand"}})
	if s := node().DrainStrategy; !s.Interrupted || s.Deadline != 30*time.Second || node().LastDrain.Meta[InterruptedBy] != "by hand" {
		t.Fatalf("interrupted by hand: %+v, %+v", s, node().LastDrain)
	}
	say(nil)
	if !node().Drain {
		t.Fatal("the agent's word ends an operator's interruption")
	}

	fresh := testNode(h.id())
	fresh.Interruption = &Interruption{Reason: "too late", At: 1}
	h.must(&RegisterNode{Node: fresh})
	if n := h.Snapshot().Node(nil, fresh.ID); !n.Drain || n.DrainStrategy.ForceDeadline > Time(h.now)+1 {
		t.Fatalf("a node that comes with a notice: %+v", n.DrainStrategy)
	}

	h.encode = func(c Command) []byte { return encodeCommand(c, rulesChildren) }
	old := testNode(h.id())
	old.Interruption = &Interruption{Reason: "x"}
	h.must(&RegisterNode{Node: old})
	if n := h.Snapshot().Node(nil, old.ID); n.Drain || n.Interruption != nil {
		t.Fatal("older rules know interruptions")
	}
}
