package main

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/rxvision/rxvision/cluster"
)

// waiting is a job of which a part runs and a part waits.
var waiting = &cluster.Explanation{
	Namespace: "default", JobID: "train", Type: "batch", Status: "running", Priority: 50,
	Groups: []*cluster.GroupStanding{{
		Name: "g", Desired: 8, Running: 5, Queued: 3, Runs: []*cluster.NodeShare{{NodeName: "gpu-1", Allocs: 4, Since: 1e18}, {NodeName: "gpu-2", Allocs: 1, Since: 1e18}},
		Failure:   &cluster.AllocMetric{},
		Nodes:     &cluster.NodeCounts{Total: 4, Full: 2, Filtered: 1, NotReady: map[string]int{"draining": 1}},
		Filters:   []*cluster.NodeReason{{Reason: "missing devices", Nodes: 1, Examples: []string{"cpu-1"}}},
		Shortages: []*cluster.Shortage{{What: "nvidia/gpu", Unit: "devices", Nodes: 2, Asked: 1, Total: 12}},
		Holders: []*cluster.Holder{
			{Namespace: "default", JobID: "train-7", Priority: 50, Allocs: 7, Nodes: 2, Milli: 7000, Since: 1e18, Until: 2e18, Obstacles: []*cluster.Obstacle{{Kind: cluster.ObstaclePriority, Allocs: 7}}},
			{Hidden: true, Jobs: 2, Allocs: 3, Milli: 2500},
		},
		Preempt: &cluster.PreemptVerdict{Helps: true, Victims: []*cluster.Victim{{JobID: "train-7"}}, Obstacles: []*cluster.Obstacle{
			{Kind: cluster.ObstacleSwitch, What: "batch"}, {Kind: cluster.ObstaclePriority, Allocs: 1},
		}},
		Start: &cluster.Start{At: 2e18, Because: []*cluster.Holder{{Namespace: "default", JobID: "train-7"}}},
	}},
	Queue: &cluster.QueuePosition{Position: 2, Of: 14, InPriority: 1, OfPriority: 3, InNamespace: 1, OfNamespace: 2, Blocked: true},
}

const waitingText = `Job:       train, batch, priority 50, running
Runs:      5 of 8 allocations on gpu-1 (4), gpu-2, since 09-09 01:46.
Waits:     3 of 8 allocations lack 1 nvidia/gpu.
Nodes:     of 4: 2 full, 1 that cannot run it, 1 draining.
           1 node: missing devices (cpu-1)
Queue:     position 2 of 14; 1 of 3 in its priority, 1 of 2 in its namespace; it
           was tried, and is again when room appears.
Start:     not before 05-18 03:33, when the declared run time of train-7 is
           over.
Preempt:   without 1 allocation of train-7 there would be room. In the way:
           preemption is off for batch jobs (nomad operator scheduler set-config
           -preempt-batch-scheduler=true); the priority of 1 is not at least 10
           below 50.

SHORT OF    UNIT     ASKED  NODES  MOST ON ONE  FREE  OF
nvidia/gpu  devices  1      2      0            0     12

HELD BY   PRIO  ALLOCS  HOLDS  SINCE        ENDS         SHIELD
train-7   50    7       7      09-09 01:46  05-18 03:33  priority
2 others  0     3       2.5    -            -            3 of 3
`

// TestJobExplain: what is printed of an explanation, within 80 columns, and what is asked of the server.
func TestJobExplain(t *testing.T) {
	t.Setenv("NOMAD_NAMESPACE", "")
	var asked []string
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		asked = append(asked, r.Method+" "+r.URL.String())
		x := *waiting
		if r.Method == http.MethodPut {
			var in struct{ Job struct{ Priority int } }
			if err := json.Unmarshal(body, &in); err != nil {
				t.Error(err)
			}
			x.Status, x.Priority, x.Queue = "", in.Job.Priority, nil
			x.Preempts = []*cluster.Victim{{Name: "low.g[1]", Priority: 20, NodeName: "gpu-1", Milli: 1000, LostSeconds: 600, Checkpoint: &cluster.Checkpoint{Step: 7}}}
			x.Groups = []*cluster.GroupStanding{{Name: "g", Desired: 1, Queued: 1, Start: &cluster.Start{At: 2e18}, Places: []*cluster.PlannedSeat{{
				Name: "train.g[0]", NodeName: "gpu-1", Claim: true, Awaits: 1, Devices: []*cluster.SeatDevice{{ID: "GPU-0", Ordinal: 1}},
			}}}}
		}
		_ = json.NewEncoder(w).Encode(&x)
	}))
	defer server.Close()
	code, out := runs(t, "job", "explain", "train", "-namespace", "default", "-address", server.URL)
	if code != exitOK || out != waitingText {
		t.Errorf("code %d, printed:\n%s\nwant:\n%s", code, out, waitingText)
	}
	for _, line := range strings.Split(out, "\n") {
		if utf8.RuneCountInString(line) > screen {
			t.Errorf("wider than %d columns: %s", screen, line)
		}
	}
	if code, out := runs(t, "job", "explain", "-json", "train", "-address", server.URL); code != exitOK || !strings.Contains(out, `"InPriority": 1`) {
		t.Errorf("code %d\n%s", code, out)
	}
	file := filepath.Join(t.TempDir(), "job.hcl")
	if err := os.WriteFile(file, []byte("job \"train\" {\n  type = \"batch\"\n  group \"g\" {\n    task \"t\" {\n      driver = \"raw_exec\"\n    }\n  }\n}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	code, out = runs(t, "job", "what-if", "-priority", "70", file, "-address", server.URL)
	plain := strings.Join(strings.Fields(out), " ")
	for _, text := range []string{"train, batch, priority 70; it is new", "1 allocation once others have left", "train.g[0] gpu-1 after 1 - 1 GPU-0", "low.g[1] 20 gpu-1 1 10m0s since step 7"} {
		if !strings.Contains(plain, text) {
			t.Errorf("what-if lacks %q:\n%s", text, out)
		}
	}
	if code != exitOK || asked[0] != "GET /v1/job/train/explain?namespace=default" || asked[2] != "PUT /v1/jobs/what-if" {
		t.Errorf("code %d, asked %q", code, asked)
	}
}
