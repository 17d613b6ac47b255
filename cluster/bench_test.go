package cluster

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"
)

// world makes records as real ones are: jobs with all that jobspec fills in, allocations with
// devices, ports, scores and the events of their tasks.
type world struct {
	r     *rand.Rand
	nodes []*Node
}

func newWorld(nodes int) *world {
	w := &world{r: rand.New(rand.NewPCG(1, 2))}
	for i := range nodes {
		n := testNode(w.uuid())
		n.Name = fmt.Sprintf("node-%04d.rack-%02d.example.net", i, i%40)
		n.Status, n.SchedulingEligibility = NodeStatusReady, NodeEligible
		n.NodeResources.Cpu.CpuShares, n.NodeResources.Memory.MemoryMB, n.NodeResources.Disk.DiskMB = 1e9, 1e9, 1e9
		w.nodes = append(w.nodes, n)
	}
	return w
}

func (w *world) uuid() string {
	a, b := w.r.Uint64(), w.r.Uint64()
	return fmt.Sprintf("%08x-%04x-%04x-%04x-%012x", a>>32, a>>16&0xffff, a&0xffff, b>>48, b&0xffffffffffff)
}

func (w *world) job(i int) *Job {
	id := fmt.Sprintf("service-%06d", i)
	return &Job{
		Region: "global", Namespace: DefaultNamespace, ID: id, Name: id, Type: JobTypeService,
		Priority: DefaultPriority, Datacenters: []string{"*"}, NodePool: DefaultNodePool,
		Constraints: []*Constraint{{"${attr.kernel.name}", "linux", "="}},
		Meta:        map[string]string{"owner": "team-" + strconv.Itoa(i%20)},
		TaskGroups: []*TaskGroup{{
			Name: "web", Count: 10,
			RestartPolicy:    &RestartPolicy{Attempts: 2, Interval: 30 * time.Minute, Delay: 15 * time.Second, Mode: "fail"},
			ReschedulePolicy: &ReschedulePolicy{Delay: 30 * time.Second, DelayFunction: "exponential", MaxDelay: time.Hour, Unlimited: true},
			EphemeralDisk:    &EphemeralDisk{SizeMB: 300},
			Update: &UpdateStrategy{
				Stagger: 30 * time.Second, MaxParallel: 1, HealthCheck: "task_states", MinHealthyTime: 10 * time.Second,
				HealthyDeadline: 5 * time.Minute, ProgressDeadline: 10 * time.Minute,
			},
			Migrate:  &MigrateStrategy{MaxParallel: 1, HealthCheck: "task_states", MinHealthyTime: 10 * time.Second, HealthyDeadline: 5 * time.Minute},
			Networks: []*NetworkResource{{Mode: "host", DynamicPorts: []Port{{Label: "http"}}}},
			Tasks: []*Task{{
				Name: "server", Driver: "raw_exec",
				Config:        json.RawMessage(`{"args":["--listen","${NOMAD_ADDR_http}","--root","local/www"],"command":"local/bin/server"}`),
				Env:           map[string]string{"LOG_LEVEL": "info", "REGION": "eu-central"},
				Resources:     &Resources{CPU: 100, MemoryMB: 256, Devices: []*RequestedDevice{{Name: "nvidia/gpu-mib", Count: 1024}}},
				RestartPolicy: &RestartPolicy{Attempts: 2, Interval: 30 * time.Minute, Delay: 15 * time.Second, Mode: "fail"},
				KillTimeout:   5 * time.Second, LogConfig: &LogConfig{MaxFiles: 10, MaxFileSizeMB: 10},
			}},
		}},
	}
}

func (w *world) register(i int) *RegisterJob {
	source := fmt.Sprintf("job \"service-%06d\" {\n  group \"web\" {\n    count = 10\n    network {\n      port \"http\" {}\n    }\n    task \"server\" {\n      driver = \"raw_exec\"\n      config {\n        command = \"local/bin/server\"\n        args    = [\"--listen\", \"${NOMAD_ADDR_http}\", \"--root\", \"local/www\"]\n      }\n      resources {\n        cpu    = 100\n        memory = 256\n      }\n    }\n  }\n}\n", i)
	return &RegisterJob{
		Stamp: Stamp{RequestID: w.uuid(), Time: 1795000000000000000 + int64(i)}, Job: w.job(i), EvalID: w.uuid(),
		Submission: &JobSubmission{Source: source, Format: "hcl2"},
	}
}

func (w *world) alloc(j *Job, e *Evaluation, deployment string, k int) *Allocation {
	n := w.nodes[w.r.IntN(len(w.nodes))]
	port := 20000 + w.r.IntN(12000)
	m := &AllocMetric{
		NodesEvaluated: len(w.nodes), NodesInPool: len(w.nodes), NodePool: DefaultNodePool,
		NodesAvailable: map[string]int{"dc1": len(w.nodes)}, ClassFiltered: map[string]int{}, ConstraintFiltered: map[string]int{},
		ClassExhausted: map[string]int{}, DimensionExhausted: map[string]int{}, AllocationTime: time.Duration(w.r.IntN(1e6)),
	}
	for range 3 {
		m.ScoreMetaData = append(m.ScoreMetaData, &NodeScore{
			NodeID: w.nodes[w.r.IntN(len(w.nodes))].ID, Norm: int64(w.r.IntN(1000)),
			Scores: map[string]int64{"binpack": int64(w.r.IntN(1000)), "job-anti-affinity": -int64(w.r.IntN(1000))},
		})
	}
	return &Allocation{
		ID: w.uuid(), Namespace: j.Namespace, EvalID: e.ID, Name: fmt.Sprintf("%s.web[%d]", j.ID, k), NodeID: n.ID, NodeName: n.Name,
		JobID: j.ID, JobVersion: j.Version, JobCreateIndex: j.CreateIndex, TaskGroup: "web", DesiredStatus: AllocDesiredRun,
		AllocatedResources: &AllocatedResources{
			Tasks: map[string]*AllocatedTaskResources{"server": {Cpu: AllocatedCPU{100}, Memory: AllocatedMemory{MemoryMB: 256}}},
			Shared: AllocatedSharedResources{
				DiskMB:   300,
				Networks: []*NetworkResource{{Mode: "host", IP: "10.0.0.7", DynamicPorts: []Port{{Label: "http", Value: port, To: port}}}},
				Ports:    []PortMapping{{Label: "http", Value: port, To: port, HostIP: "10.0.0.7"}},
			},
		},
		Metrics: m, DeploymentID: deployment, ClientStatus: AllocClientPending,
		CreateTime: 1795000000000000000, ModifyTime: 1795000000000000000,
	}
}

// states is what a node says of an allocation that runs, with all the events of a start.
func (w *world) states() map[string]*TaskState {
	now := int64(1795000000000000000) + w.r.Int64N(1e15)
	event := func(kind, display, message string) *TaskEvent {
		e := &TaskEvent{Type: kind, Time: now, DisplayMessage: display, Details: map[string]string{}}
		if now += w.r.Int64N(1e8); message != "" {
			e.Message, e.Details["message"] = message, message
		}
		return e
	}
	return map[string]*TaskState{"server": {
		State: TaskStateRunning, StartedAt: Time(now), Events: []*TaskEvent{
			event("Received", "Task received by client", ""),
			event("Task Setup", "Building Task Directory", "Building Task Directory"),
			event("Downloading Artifacts", "Client is downloading artifacts", ""),
			event("Started", "Task started by client", ""),
		},
	}}
}

func (w *world) update(a *Allocation) *Allocation {
	yes := true
	return &Allocation{
		ID: a.ID, NodeID: a.NodeID, ClientStatus: AllocClientRunning, ClientDescription: "Tasks are running", TaskStates: w.states(),
		DeploymentStatus: &AllocDeploymentStatus{Healthy: &yes, Timestamp: Time(1795000000000000000 + w.r.Int64N(1e15))},
	}
}

// fill registers jobs from i on, places count allocations of each and lets them run; it
// calls each with every log entry.
func (w *world) fill(tb testing.TB, s *State, index *uint64, jobs, count int, each func(Command, []byte)) {
	apply := func(c Command) Result {
		if StampOf(c).RequestID == "" {
			*StampOf(c) = Stamp{RequestID: w.uuid(), Time: 1795000000000000000 + int64(*index)}
		}
		entry := EncodeCommand(c)
		if each != nil {
			each(c, entry)
		}
		*index++
		res, err := s.Apply(*index, entry)
		if err != nil || res.Err != nil {
			tb.Fatalf("%T: %v %v", c, err, res.Err)
		}
		return res
	}
	if *index == 0 {
		for _, n := range w.nodes {
			apply(&RegisterNode{Node: n})
		}
	}
	refused := 0
	for i := range jobs {
		res := apply(w.register(i))
		snap := s.Snapshot()
		e := snap.Eval(nil, res.EvalID)
		j := snap.Job(nil, e.JobKey())
		d := &Deployment{
			ID: w.uuid(), Namespace: j.Namespace, JobID: j.ID, JobVersion: j.Version, JobModifyIndex: j.JobModifyIndex, Status: DeploymentRunning,
			StatusDescription: DeploymentDescRunning,
			TaskGroups:        map[string]*DeploymentState{"web": {DesiredTotal: count, ProgressDeadline: time.Minute}},
		}
		done := answered(e)
		done.QueuedAllocations, done.DeploymentID = map[string]int{"web": 0}, d.ID
		p := &Plan{
			EvalID: e.ID, EvalEpoch: e.ModifyIndex, Namespace: j.Namespace, JobID: j.ID, JobVersion: j.Version, JobModifyIndex: j.JobModifyIndex,
			Deployment: d, Evals: []*Evaluation{done},
		}
		u := &UpdateAllocs{}
		for k := range count {
			a := w.alloc(j, e, d.ID, k)
			p.Place, u.Allocs = append(p.Place, a), append(u.Allocs, w.update(a))
		}
		if res := apply(&ApplyPlans{Plans: []*Plan{p}}); len(res.Plans[0].Refused) > 0 {
			// A port that is taken already: real placement would have seen it.
			refused++
		}
		apply(u)
	}
	if refused > jobs*count/100 {
		tb.Fatalf("%d nodes refused their allocations", refused)
	}
}

// entries are the log of that many jobs with one allocation each, by kind.
func benchEntries(b *testing.B, jobs int) (log [][]byte, byKind map[string][][]byte) {
	byKind = map[string][][]byte{}
	var index uint64
	newWorld(1000).fill(b, NewState(), &index, jobs, 1, func(c Command, entry []byte) {
		log = append(log, entry)
		name := fmt.Sprintf("%T", c)[len("*cluster."):]
		byKind[name] = append(byKind[name], entry)
	})
	return log, byKind
}

// BenchmarkApply is the time of one command, entry by entry.
func BenchmarkApply(b *testing.B) {
	log, _ := benchEntries(b, 2000)
	b.Run("Register", func(b *testing.B) {
		w := newWorld(0)
		entries := make([][]byte, b.N)
		for i := range entries {
			entries[i] = EncodeCommand(w.register(i))
		}
		s := NewState()
		b.ReportAllocs()
		b.ResetTimer()
		before := cpuTime()
		for i, e := range entries {
			if _, err := s.Apply(uint64(i+1), e); err != nil {
				b.Fatal(err)
			}
		}
		b.ReportMetric(float64(cpuTime()-before)/float64(b.N), "cpu-ns/op")
	})
	b.Run("Register64", func(b *testing.B) { // in batches, as raft gives them when there is much to do
		w := newWorld(0)
		entries := make([]Entry, b.N)
		for i := range entries {
			entries[i] = Entry{uint64(i + 1), EncodeCommand(w.register(i))}
		}
		s := NewState()
		b.ReportAllocs()
		b.ResetTimer()
		before := cpuTime()
		for part := range slices.Chunk(entries, 64) {
			if _, err := s.ApplyBatch(part); err != nil {
				b.Fatal(err)
			}
		}
		b.ReportMetric(float64(cpuTime()-before)/float64(b.N), "cpu-ns/op")
	})
	b.Run("Mixed", func(b *testing.B) {
		b.ReportAllocs()
		s, n := NewState(), 0
		for i := range b.N {
			if n == len(log) {
				s, n = NewState(), 0
			}
			if _, err := s.Apply(uint64(i+1), log[n]); err != nil {
				b.Fatal(err)
			}
			n++
		}
	})
}

// BenchmarkCommand is the time to encode and decode one command of a kind.
func BenchmarkCommand(b *testing.B) {
	_, byKind := benchEntries(b, 200)
	w := newWorld(100)
	a := w.alloc(w.job(1), &Evaluation{ID: w.uuid()}, w.uuid(), 1)
	a.TaskStates = w.states()
	record := Marshal(a)
	b.Run("decode/allocation", func(b *testing.B) {
		b.ReportAllocs()
		shared := newInterner(internBits)
		for b.Loop() {
			if err := unmarshal(record, new(Allocation), shared); err != nil {
				b.Fatal(err)
			}
		}
	})
	a.pack()
	b.Run("encode/allocation", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			Marshal(a)
		}
	})
	for _, kind := range sortedKeys(byKind) {
		entries := byKind[kind]
		b.Run("decode/"+kind, func(b *testing.B) {
			b.ReportAllocs()
			for i := range b.N {
				if _, err := DecodeCommand(entries[i%len(entries)]); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run("encode/"+kind, func(b *testing.B) {
			c, err := DecodeCommand(entries[0])
			if err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			for b.Loop() {
				EncodeCommand(c)
			}
		})
	}
}

// cpuTime is what this process has used of the processors, its collector included.
func cpuTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		panic(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func heap() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// BenchmarkState1M fills a state with RXVISION_BENCH_JOBS jobs (100000 for the million) of ten allocations each, writes
// its records to a file and restores them from there. It prints what an allocation takes, with its share of jobs,
// evaluations, deployments and the rest, and how long all of it takes, in seconds on the clock and of processor time.
func BenchmarkState1M(b *testing.B) {
	var jobs int
	if _, err := fmt.Sscan(os.Getenv("RXVISION_BENCH_JOBS"), &jobs); err != nil {
		b.Skip("takes gigabytes and minutes: set RXVISION_BENCH_JOBS to a number of jobs, 100000 for a million allocations")
	}
	const each = 10
	n := float64(jobs * each)
	timed := func(what string, do func()) {
		start, cpu := time.Now(), cpuTime()
		do()
		b.ReportMetric(time.Since(start).Seconds(), what+"-s")
		b.ReportMetric((cpuTime() - cpu).Seconds(), what+"-cpu-s")
	}
	path := filepath.Join(b.TempDir(), "records")
	for range b.N {
		before := heap()
		var index uint64
		w, s := newWorld(5000), NewState()
		timed("fill", func() { w.fill(b, s, &index, jobs, each, nil) })
		w = nil
		b.ReportMetric(float64(heap()-before)/n, "heap-B/alloc")
		timed("records", func() { saveRecords(b, path, s.Snapshot()) })
		s = nil
		before = heap()
		r := NewRestore()
		timed("add", func() { loadRecords(b, path, r) })
		timed("check", func() {
			var err error
			if s, err = r.Done(); err != nil {
				b.Fatal(err)
			}
		})
		r = nil
		b.ReportMetric(float64(heap()-before)/n, "restored-B/alloc")
		runtime.KeepAlive(s)
	}
}

// saveRecords writes each record as its table's byte, its length and its stored form.
func saveRecords(b *testing.B, path string, s *Snapshot) {
	f, err := os.Create(path)
	if err != nil {
		b.Fatal(err)
	}
	out := bufio.NewWriterSize(f, 1<<20)
	size := map[string]int{}
	var head [5]byte
	var record []byte
	err = s.Records(func(t *Table, _ string, v any) error {
		record = AppendStored(record[:0], v)
		size[t.Name] += len(record)
		head[0] = t.Record
		binary.BigEndian.PutUint32(head[1:], uint32(len(record)))
		_, err1 := out.Write(head[:])
		_, err2 := out.Write(record)
		return errors.Join(err1, err2)
	})
	if err := errors.Join(err, out.Flush(), f.Close()); err != nil {
		b.Fatal(err)
	}
	for _, name := range sortedKeys(size) {
		if size[name] > 0 {
			b.Logf("%-18s %6.1f MB stored", name, float64(size[name])/1e6)
		}
	}
}

func loadRecords(b *testing.B, path string, r *Restore) {
	f, err := os.Open(path)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	in := bufio.NewReaderSize(f, 1<<20)
	var head [5]byte
	var record []byte
	for {
		if _, err := io.ReadFull(in, head[:]); err == io.EOF {
			return
		} else if err != nil {
			b.Fatal(err)
		}
		record = slices.Grow(record[:0], int(binary.BigEndian.Uint32(head[1:])))[:binary.BigEndian.Uint32(head[1:])]
		if _, err := io.ReadFull(in, record); err != nil {
			b.Fatal(err)
		}
		if err := r.Add(TableOf(head[0]), record); err != nil {
			b.Fatal(err)
		}
	}
}
