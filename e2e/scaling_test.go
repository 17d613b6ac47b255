package e2e

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const scaling = `
    scaling {
      min = 0
      max = 3
      policy {
        cooldown             = "1s"
        stabilization_window = "5s"
        check "load" {
          source       = "rxvision"
          query        = "in_flight"
          query_window = "5s"
          strategy "target-value" {
            target = 2
          }
        }
      }
    }
    update {`

// TestScaleToZeroAndBack serves a model by a group that has no allocation while nobody asks: the first request waits for one,
// and is answered.
func TestScaleToZeroAndBack(t *testing.T) {
	nomadBinary(t)
	p := newPlatform(t)
	p.start()
	p.rxvision(0, "model", "push", "fashion", "models/fashion/fashion.onnx")
	text, err := os.ReadFile(filepath.Join(root, "jobs/examples/fashion.nomad.hcl"))
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "scaled.nomad.hcl")
	edited := strings.Replace(strings.Replace(string(text), "count = 1", "count = 0", 1), "\n    update {", scaling, 1)
	if err := os.WriteFile(file, []byte(edited), 0o644); err != nil {
		t.Fatal(err)
	}
	p.nomad(0, "job", "run", file)
	picture := filepath.Join(root, "testdata/fashion/0000-9.png")
	for range 2 {
		if r := p.command(binary, "infer", "fashion", picture); r.code != 0 {
			t.Fatalf("a request to a model that sleeps: %s", r.text)
		}
		var state struct {
			TaskGroups map[string]struct{ Desired, Running int }
		}
		p.get("/v1/job/fashion/scale", &state)
		if g := state.TaskGroups["serve"]; g.Desired != 1 || g.Running != 1 {
			t.Errorf("after an answer the group has %+v", g)
		}
		p.await("the group sleeps again", func() bool {
			p.get("/v1/job/fashion/scale", &state)
			g := state.TaskGroups["serve"]
			return g.Desired == 0 && g.Running == 0
		})
	}
	p.nomad(0, "job", "scaling-events", "-verbose", "fashion").has(t, "requests wait for a replica", "in_flight is 0 per allocation")
	p.nomad(0, "scaling", "policy", "list").has(t, "horizontal")
}

// busy asks for the processor as long as a file is there.
const busyJob = `
job "busy" {
  group "g" {
    count = 1
    scaling {
      min = 1
      max = 3
      policy {
        cooldown             = "1s"
        stabilization_window = "5s"
        check "processor" {
          source       = "rxvision"
          query        = "cpu"
          query_window = "5s"
          strategy "target-value" { target = 50 }
        }
      }
    }
    update {
      min_healthy_time = "1s"
    }
    task "t" {
      driver = "raw_exec"
      config {
        command = "/bin/sh"
        args    = ["-c", "while :; do if [ -e FILE ]; then i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; else sleep 1; fi; done"]
      }
      resources {
        cpu    = 300
        memory = 32
      }
    }
  }
}
`

// TestScaleByLoad has a group grow with what its allocations use of the processor, and shrink again.
func TestScaleByLoad(t *testing.T) {
	nomadBinary(t)
	p := newPlatform(t)
	p.start()
	load, file := filepath.Join(t.TempDir(), "load"), filepath.Join(t.TempDir(), "busy.nomad.hcl")
	if err := errors.Join(os.WriteFile(load, nil, 0o644), os.WriteFile(file, []byte(strings.Replace(busyJob, "FILE", load, 1)), 0o644)); err != nil {
		t.Fatal(err)
	}
	p.nomad(0, "job", "run", file)
	var state struct {
		TaskGroups map[string]struct{ Desired, Running int }
	}
	count := func(n int) func() bool {
		return func() bool {
			p.get("/v1/job/busy/scale", &state)
			g := state.TaskGroups["g"]
			return g.Desired == n && g.Running == n
		}
	}
	p.await("the group grows", count(3))
	var policies []struct{ ID string }
	p.get("/v1/scaling/policies", &policies)
	if len(policies) != 1 {
		t.Fatalf("policies %v", policies)
	}
	var policy struct{ Status, StatusDescription string }
	p.await("the leader says how the policy fares", func() bool {
		p.get("/v1/scaling/policy/"+policies[0].ID, &policy)
		return policy.Status != "" && policy.Status != "unknown" && strings.Contains(policy.StatusDescription, "processor")
	})
	if err := os.Remove(load); err != nil {
		t.Fatal(err)
	}
	p.await("the group shrinks", func() bool {
		p.get("/v1/scaling/policy/"+policies[0].ID, &policy)
		return count(1)()
	})
	p.nomad(0, "job", "scaling-events", "-verbose", "busy").has(t, "check processor: cpu is")
	p.nomad(0, "scaling", "policy", "info", policies[0].ID).has(t, "target-value")
}
