package swarm

import (
	"testing"
	"time"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet/pb"
)

// desired tells of allocations that were given one device each.
func desired(allocs ...*cluster.Allocation) *pb.Desired {
	d := new(pb.Desired)
	for _, a := range allocs {
		d.Allocs = append(d.Allocs, cluster.Marshal(a))
	}
	return d
}

func onDevice(id, device, wanted, status string) *cluster.Allocation {
	return &cluster.Allocation{
		ID: id, JobID: "j", DesiredStatus: wanted, ClientStatus: status,
		AllocatedResources: &cluster.AllocatedResources{Tasks: map[string]*cluster.AllocatedTaskResources{
			"t": {Devices: []*cluster.AllocatedDevice{{Vendor: "nvidia", Type: "gpu", DeviceIDs: []string{device}}}},
		}},
	}
}

// mustSwarm makes a swarm of one node whose stops take a minute.
func mustSwarm(t *testing.T) (*Swarm, *node) {
	t.Helper()
	s, err := New(Config{Count: 1, Servers: []string{"nobody:1"}, Profile: GPU, Stop: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	return s, s.nodes[0]
}

// A node tells when a device is given away while an allocation runs on it that the
// servers have not given up, asked to stop or not.
func TestDeviceGivenTwice(t *testing.T) {
	const run, stop = cluster.AllocDesiredRun, cluster.AllocDesiredStop
	for name, c := range map[string]struct {
		holder    *cluster.Allocation // as told when the second comes
		device    string              // of the second
		conflicts int
		running   bool // the second, at once
	}{
		"another device": {onDevice("a", "gpu-0", run, cluster.AllocClientRunning), "gpu-1", 0, true},
		"it runs":        {onDevice("a", "gpu-0", run, cluster.AllocClientRunning), "gpu-0", 1, true},
		"it is stopping": {onDevice("a", "gpu-0", stop, cluster.AllocClientRunning), "gpu-0", 1, true},
		"it was lost":    {onDevice("a", "gpu-0", stop, cluster.AllocClientLost), "gpu-0", 0, false},
	} {
		t.Run(name, func(t *testing.T) {
			s, n := mustSwarm(t)
			now := time.Now()
			later := func(d time.Duration) {
				now = now.Add(d)
				n.step(now)
			}
			must := func(d *pb.Desired) {
				t.Helper()
				if err := n.desire(d); err != nil {
					t.Fatal(err)
				}
			}
			must(desired(onDevice("a", "gpu-0", run, cluster.AllocClientPending)))
			later(time.Second)
			if v := s.View(); v.Running != 1 || len(v.Held) != 1 || v.Held[0].Devices[0] != "gpu-0" {
				t.Fatalf("the first does not run: %+v", v)
			}
			// In one message, the newer one first: the order says nothing.
			must(desired(onDevice("b", c.device, run, cluster.AllocClientPending), c.holder))
			later(time.Second)
			status := map[string]string{}
			for _, h := range s.View().Held {
				status[h.Alloc] = h.Status
			}
			if got := status["b"] == cluster.AllocClientRunning; got != c.running {
				t.Errorf("the second is %s", status["b"])
			}
			later(2 * time.Minute)
			later(time.Second)
			v := s.View()
			if len(v.Conflicts) != c.conflicts || int(v.Stats.Conflicts) != c.conflicts {
				t.Errorf("conflicts %+v, want %d", v.Conflicts, c.conflicts)
			}
			for _, h := range v.Held {
				if h.Alloc == "b" && h.Status != cluster.AllocClientRunning {
					t.Errorf("the second is %s after the first has ended", h.Status)
				}
			}
		})
	}
}

// What the servers forgot ends, and holds its device until then.
func TestForgottenHoldsItsDevice(t *testing.T) {
	s, n := mustSwarm(t)
	if err := n.desire(desired(onDevice("a", "gpu-0", cluster.AllocDesiredRun, cluster.AllocClientPending))); err != nil {
		t.Fatal(err)
	}
	now := time.Now().Add(time.Second)
	n.step(now)
	d := desired(onDevice("b", "gpu-0", cluster.AllocDesiredRun, cluster.AllocClientPending))
	d.Full = true
	if err := n.desire(d); err != nil {
		t.Fatal(err)
	}
	n.step(now.Add(time.Second))
	if v := s.View(); v.Running != 1 || v.Pending != 1 || len(v.Held) != 2 {
		t.Errorf("beside what is not over: %+v", v)
	}
	n.step(now.Add(2 * time.Minute))
	n.step(now.Add(3 * time.Minute))
	v := s.View()
	if v.Running != 1 || len(v.Held) != 1 || v.Held[0].Alloc != "b" || len(v.Conflicts) != 0 {
		t.Errorf("afterwards: %+v", v)
	}
}
