package main

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rxvision/rxvision/api"
	"github.com/rxvision/rxvision/cluster"
)

// TestNodeGPU: what the commands ask the servers for, by a node's name.
func TestNodeGPU(t *testing.T) {
	const id = "0a1b2c3d-0000-4000-8000-000000000001"
	var asked []string
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		switch {
		case r.URL.Path == "/v1/nodes":
			_, _ = io.WriteString(w, `[{"ID": "`+id+`", "Name": "gpu-17"}, {"ID": "0a1bffff-0000-4000-8000-000000000001", "Name": "gpu-18"}]`)
		case r.Method == http.MethodGet:
			_ = json.NewEncoder(w).Encode([]*api.Device{
				{ID: "GPU-0", Group: "nvidia/gpu/T4", Healthy: true, Allocations: []string{"a", "b"}, Order: &cluster.DeviceOrder{Order: cluster.DeviceTrust, HealthDescription: "XID 48"}},
				{ID: "GPU-1", Group: "nvidia/gpu/T4", HealthDescription: "XID 79: GPU has fallen off the bus"},
			})
		default:
			asked = append(asked, r.Method+" "+strings.TrimPrefix(r.URL.Path, "/v1/node/"+id)+" "+strings.TrimSpace(string(body)))
			_, _ = io.WriteString(w, "{}")
		}
	}))
	defer server.Close()
	wants := func(code int, args []string, texts ...string) {
		t.Helper()
		got, out := runs(t, append([]string{"node"}, append(args, "-address", server.URL)...)...)
		if got != code {
			t.Errorf("%v: code %d\n%s", args, got, out)
		}
		for _, text := range texts {
			if !strings.Contains(strings.Join(strings.Fields(out), " "), text) {
				t.Errorf("%v lacks %q:\n%s", args, text, out)
			}
		}
	}
	wants(exitOK, []string{"gpu", "list", "gpu-17"}, "GPU-0 nvidia/gpu/T4 healthy trust; its node says: XID 48 2", "GPU-1 nvidia/gpu/T4 XID 79: GPU has fallen off the bus - 0")
	wants(exitOK, []string{"gpu", "cordon", "0a1b2", "GPU-0", "-reason", "fan", "-move"})
	wants(exitOK, []string{"gpu", "uncordon", "gpu-17", "GPU-0"})
	wants(exitOK, []string{"gpu", "uncordon", id, "GPU-1", "-force"})
	wants(exitOK, []string{"interrupt", "gpu-17", "-deadline", "90s"}, "node "+id+" is emptied")
	wants(exitError, []string{"gpu", "list", "0a1b"}, "means 2 nodes")
	wants(exitError, []string{"gpu", "list", "nobody"}, "no node")
	ask := func(path string, body any) string {
		b, err := json.Marshal(body)
		if err != nil {
			t.Fatal(err)
		}
		return "PUT " + path + " " + string(b)
	}
	want := []string{
		ask("/devices", api.DeviceOrder{Device: "GPU-0", Order: cluster.DeviceCordon, Reason: "fan", Move: true}),
		ask("/devices", api.DeviceOrder{Device: "GPU-0"}),
		ask("/devices", api.DeviceOrder{Device: "GPU-1", Order: cluster.DeviceTrust}),
		ask("/interrupt", api.NodeInterruption{Deadline: 90 * time.Second}),
	}
	if !slices.Equal(asked, want) {
		t.Errorf("asked\n%s\nwant\n%s", strings.Join(asked, "\n"), strings.Join(want, "\n"))
	}
}
