package place

import (
	"fmt"
	"testing"

	"github.com/rxvision/rxvision/cluster"
)

// BenchmarkPlace places one allocation after another on nodes of 8 GPUs until they are full, then on the same ones emptied
// again: kinds of work as a production trace has them, 150 of them.
func BenchmarkPlace(b *testing.B) {
	for _, size := range []int{1_213, 10_000} {
		b.Run(fmt.Sprintf("nodes=%d", size), func(b *testing.B) {
			r := &benchReader{version: new(int)}
			for i := range size {
				g := &cluster.NodeDeviceResource{Vendor: "nvidia", Type: "gpu", Name: []string{"A", "B", "C"}[i%3]}
				for k := range 8 {
					g.Instances = append(g.Instances, &cluster.NodeDevice{ID: fmt.Sprintf("n%d-%d", i, k), Healthy: true})
				}
				r.nodes = append(r.nodes, &cluster.Node{
					ID: fmt.Sprintf("%06d", i), Datacenter: "dc1", NodePool: cluster.DefaultNodePool,
					NodeResources: &cluster.NodeResources{Cpu: cluster.NodeCPU{CpuShares: 96_000}, Memory: cluster.NodeMemory{MemoryMB: 400_000}, Devices: []*cluster.NodeDeviceResource{g}},
					Drivers:       map[string]*cluster.DriverInfo{"exec": {Detected: true, Healthy: true}},
					Status:        cluster.NodeStatusReady, SchedulingEligibility: cluster.NodeEligible,
				})
			}
			var work []Work
			for i := range 150 {
				d := &cluster.RequestedDevice{Name: "nvidia/gpu", Count: 1 << (i % 4)}
				if i%3 == 0 {
					d.Name, d.Count = "nvidia/gpu-milli", uint64(100+5*i)
				}
				if i%10 == 0 {
					d.Constraints = []*cluster.Constraint{{LTarget: "${device.model}", Operand: "=", RTarget: "A"}}
				}
				j := &cluster.Job{
					Namespace: cluster.DefaultNamespace, ID: fmt.Sprintf("j%d", i), Type: cluster.JobTypeBatch, Datacenters: []string{"*"}, NodePool: cluster.DefaultNodePool,
					TaskGroups: []*cluster.TaskGroup{{Name: "g", Count: 1, Tasks: []*cluster.Task{{Name: "t", Driver: "exec", Resources: &cluster.Resources{
						CPU: 1_000 + 50*i, MemoryMB: 4_096 + 100*i, Devices: []*cluster.RequestedDevice{d},
					}}}}},
				}
				work = append(work, Work{Job: j, Group: j.TaskGroups[0], Allocs: int64(200 - i)})
			}
			mix := NewMix(work)
			ids := 0
			newID := func() string { ids++; return fmt.Sprint(ids) }
			var view *View
			fresh := func() {
				var cache Cache
				cache.Expect(mix)
				view = cache.View(r)
				for _, w := range work { // all nodes are judged once for each kind
					view.Plan(Input{Job: w.Job, Eval: benchEval(newID(), w.Job), Now: 1, NewID: newID})
				}
			}
			fresh()
			b.ResetTimer()
			for i := range b.N {
				w := work[i*7%len(work)]
				if p := view.Plan(Input{Job: w.Job, Eval: benchEval(newID(), w.Job), Now: 1, NewID: newID}); len(p.Plan.Place) == 0 {
					b.StopTimer()
					fresh()
					b.StartTimer()
				}
			}
		})
	}
}

func benchEval(id string, j *cluster.Job) *cluster.Evaluation {
	return &cluster.Evaluation{ID: id, Namespace: j.Namespace, JobID: j.ID, Type: j.Type, TriggeredBy: cluster.TriggerJobRegister, Status: cluster.EvalStatusPending}
}

// benchReader is a state with nodes and nothing else.
type benchReader struct {
	Reader
	nodes   []*cluster.Node
	version *int
	config  cluster.SchedulerConfiguration
}

func (r *benchReader) Index(cluster.WatchSet, ...string) uint64 { return 1 }

func (r *benchReader) Nodes(cluster.WatchSet, string) []*cluster.Node { return r.nodes }

func (r *benchReader) AllocsHolding(cluster.WatchSet, string) []*cluster.Allocation { return nil }

func (r *benchReader) AllocsByJob(cluster.WatchSet, cluster.JobKey) []*cluster.Allocation { return nil }

func (r *benchReader) JobVersion(cluster.WatchSet, cluster.JobKey, uint64) *cluster.Job { return nil }

func (r *benchReader) LatestDeployment(cluster.WatchSet, cluster.JobKey) *cluster.Deployment {
	return nil
}
func (r *benchReader) Eval(cluster.WatchSet, string) *cluster.Evaluation   { return nil }
func (r *benchReader) OpenEvalsByJob(cluster.JobKey) []*cluster.Evaluation { return nil }
func (r *benchReader) SchedulerConfig(cluster.WatchSet) *cluster.SchedulerConfiguration {
	return &r.config
}
func (r *benchReader) FleetHold(cluster.WatchSet) *cluster.FleetHold    { return nil }
func (r *benchReader) NodesVersion() any                                { return r.version }
func (r *benchReader) AllocsVersion() any                               { return r.version }
func (r *benchReader) HoldingVersions(func(nodeID string, version any)) {}

func (r *benchReader) Claims() []*cluster.Evaluation { return nil }

func (r *benchReader) Allowance(string, func(string) *cluster.Usage) *cluster.Allowance { return nil }

func (r *benchReader) ParallelChildren(*cluster.Job) (limit, running int) { return 0, 0 }
