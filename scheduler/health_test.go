package scheduler

import (
	"testing"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

// sayDevice makes a node report one of its devices, "": healthy.
func (w *world) sayDevice(node, device, reason string) {
	w.tb.Helper()
	var c cluster.Node
	if err := cluster.Unmarshal(cluster.Marshal(w.State().Snapshot().Node(nil, node)), &c); err != nil {
		w.tb.Fatal(err)
	}
	d := c.Device(device)
	d.Healthy, d.HealthDescription = reason == "", reason
	w.must(&cluster.RegisterNode{Node: &c})
}

// TestUnhealthyDevice: what holds the GPU moves and counts no attempt, also when it fails before
// the GPU is found unhealthy; the rest of the node goes on; the healed GPU is used again.
func TestUnhealthyDevice(t *testing.T) {
	inWorld(t, func(w *world) {
		w.node("n1", 2)
		w.run(service("train", 2, batch, gpus(1)))
		snap := w.agents()
		var sick, fine *cluster.Allocation
		for _, a := range w.wantLive(snap, "train", 2) {
			if a.AllocatedResources.Tasks["t"].Devices[0].DeviceIDs[0] == "n1-gpu0" {
				sick = a
			} else {
				fine = a
			}
		}
		w.say(sick, cluster.AllocClientFailed, true) // its one attempt is 5 s away
		w.settle()
		w.sayDevice("n1", "n1-gpu0", "XID 79: GPU has fallen off the bus")
		snap = w.agents()
		if live := w.wantLive(snap, "train", 1); live[0].ID != fine.ID {
			t.Fatal("the work on the other GPU has moved")
		}
		if a := snap.Alloc(nil, sick.ID); a.DesiredDescription != "alloc is being moved off an unhealthy device" {
			t.Fatalf("the failed allocation is described %q", a.DesiredDescription)
		}
		w.node("n2", 1)
		snap = w.agents()
		var heir *cluster.Allocation
		for _, a := range w.wantLive(snap, "train", 2) {
			if a.ID != fine.ID {
				heir = a
			}
		}
		if heir.NodeID != "n2" || heir.RescheduleTracker != nil {
			t.Fatalf("the successor is on %s with %+v", heir.NodeID, heir.RescheduleTracker)
		}
		w.sayDevice("n2", "n2-gpu0", "XID 48")
		w.wantLive(w.agents(), "train", 1)
		time.Sleep(10 * time.Second)
		w.sayDevice("n1", "n1-gpu0", "")
		for _, a := range w.wantLive(w.agents(), "train", 2) {
			if a.NodeID != "n1" || a.RescheduleTracker != nil {
				t.Fatalf("after the self-test %s is on %s with %+v", a.ID, a.NodeID, a.RescheduleTracker)
			}
		}
	})
}

// TestInterruption: batch work leaves at once, services within migrate.max_parallel until half of
// the time is over.
func TestInterruption(t *testing.T) {
	inWorld(t, func(w *world) {
		w.node("n1", 0)
		w.run(service("web", 2))
		w.run(service("work", 2, batch))
		w.agents()
		w.node("n2", 0)
		w.must(&cluster.UpdateDrain{NodeID: "n1", Strategy: &cluster.DrainStrategy{Deadline: 2 * time.Minute, Interrupted: true}})
		snap := w.settle()
		moved := map[string]int{}
		for _, a := range snap.AllocsByNode(nil, "n2") {
			moved[a.JobID]++
		}
		if moved["work"] != 2 || moved["web"] != 1 {
			t.Fatalf("moved at once: %v, want all batch work and one of the service", moved)
		}
		time.Sleep(time.Minute + time.Second)
		if n := len(w.settle().AllocsByNode(nil, "n2")); n != 4 {
			t.Fatalf("%d allocations have moved at half of the time, want all 4", n)
		}
		n := w.agents().Node(nil, "n1")
		if n.Drain || n.SchedulingEligibility != cluster.NodeIneligible {
			t.Fatalf("the empty node: %+v", n)
		}
	})
}
