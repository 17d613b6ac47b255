package api_test

import (
	"net/http"
	"strings"
	"testing"

	"github.com/rxvision/rxvision/api"
	"github.com/rxvision/rxvision/cluster"
)

// TestSystemGC forgets a job that has just been stopped, and says so where there
// is no scheduler.
func TestSystemGC(t *testing.T) {
	collect := func(w *world) (status int, text string) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, w.url+"/v1/system/gc", strings.NewReader("{}"))
		if err != nil {
			t.Fatal(err)
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		b := make([]byte, 1000)
		n, _ := res.Body.Read(b)
		return res.StatusCode, string(b[:n])
	}
	w := newWorld(t)
	k := cluster.JobKey{Namespace: "default", ID: "gone"}
	w.apply(&cluster.RegisterJob{Job: &cluster.Job{
		Namespace: k.Namespace, ID: k.ID, Name: k.ID, Type: cluster.JobTypeService, Datacenters: []string{"*"}, NodePool: "default",
		TaskGroups: []*cluster.TaskGroup{{Name: "g"}},
	}})
	w.apply(&cluster.DeregisterJob{Namespace: k.Namespace, JobID: k.ID, EvalID: "33333333-67e5-efac-7b92-e754dc4a5431"})
	w.until("the stop is done", func(snap *cluster.Snapshot) bool { return snap.Job(nil, k).Status == cluster.JobStatusDead })
	if status, text := collect(w); status != http.StatusOK || text != "" {
		t.Errorf("status %d %q", status, text)
	}
	if w.store.State().Snapshot().Job(nil, k) != nil {
		t.Error("a job that was stopped is still there")
	}
	status, text := collect(newWorld(t, func(c *api.Config) { c.Collector = nil }))
	if status != http.StatusNotImplemented || !strings.Contains(text, "without a scheduler") {
		t.Errorf("without a scheduler: %d %q", status, text)
	}
}
