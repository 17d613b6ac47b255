package api_test

import (
	"strings"
	"testing"

	"github.com/rxvision/rxvision/cluster"
)

const systemSpec = `job "mon" {
  type = "system"
  update {
    max_parallel = 1
    stagger      = "1h"
  }
  group "g" {
    task "t" {
      driver = "raw_exec"
      config {
        command = "/bin/sleep"
        args    = ["1000"]
      }
      resources {
        cpu    = 100
        memory = 64
      }
    }
  }
}
`

// TestCommandLineSystem: a system job through the life of its nodes, by the commands that
// operators use.
func TestCommandLineSystem(t *testing.T) {
	c := newCLI(t)
	c.file("mon.hcl", systemSpec)
	if code, out := c.try("job", "plan", "mon.hcl"); code != 1 {
		t.Errorf("plan of a new job ends with %d:\n%s", code, out)
	} else {
		c.wants("job plan", out, []string{`+ Job: "mon"`, `+ Task Group: "g" (2 create)`, "All tasks successfully allocated"})
	}
	c.run("job run mon.hcl", `finished with status "complete"`)
	c.settled("mon", 2)
	c.run("job status mon", "Type = system", "Status = running", "g 0 0 2 0 0 0 0")
	c.run("job status", "mon system 50 running")
	c.fails(1, "job scale mon g 2", "a job of type system cannot be scaled")

	c.file("mon.hcl", strings.ReplaceAll(systemSpec, `["1000"]`, `["2000"]`))
	if code, out := c.try("job", "plan", "mon.hcl"); code != 1 {
		t.Errorf("plan of a change ends with %d:\n%s", code, out)
	} else {
		c.wants("job plan", out, []string{`+/- Task Group: "g" (1 create/destroy update, 1 ignore)`, "Rolling update, next evaluation will be in 1h0m0s."})
	}
	c.run("job run -detach mon.hcl")
	key := cluster.JobKey{Namespace: "default", ID: "mon"}
	c.until("one of two is updated, and the rest waits", func(snap *cluster.Snapshot) bool {
		updated, old := 0, 0
		for _, a := range snap.AllocsByJob(nil, key) {
			if a.ClientStatus != cluster.AllocClientRunning {
				continue
			}
			if a.JobVersion == 1 {
				updated++
			} else {
				old++
			}
		}
		return updated == 1 && old == 1
	})
	c.run("eval list", "rolling-update mon")

	c.run("node drain -enable -yes -detach -ignore-system " + cpuNode)
	c.until("the drain is over", func(snap *cluster.Snapshot) bool { n := snap.Node(nil, cpuNode); return !n.Drain && n.LastDrain != nil })
	running := func(want int) func(*cluster.Snapshot) bool {
		return func(snap *cluster.Snapshot) bool {
			n := 0
			for _, a := range snap.AllocsByJob(nil, key) {
				if a.ClientStatus == cluster.AllocClientRunning {
					n++
				}
			}
			return n == want
		}
	}
	c.until("both run still", running(2))
	c.run("node drain -enable -yes -detach " + cpuNode)
	c.until("it has left the node", running(1))
	c.until("this drain is over, too", func(snap *cluster.Snapshot) bool { return !snap.Node(nil, cpuNode).Drain })
	c.run("node eligibility -enable "+cpuNode, "scheduling eligibility set: eligible for scheduling")
	c.until("it is back on the node", running(2))
	c.run("job stop -detach mon")
	c.until("it has left all nodes", running(0))
	c.run("job status mon", "Status = dead (stopped)")

	c.file("fix.hcl", strings.NewReplacer(`job "mon"`, `job "fix"`, `"system"`, `"sysbatch"`).Replace(systemSpec))
	c.run("job run -detach fix.hcl")
	c.settled("fix", 2)
	c.run("job status fix", "Type = sysbatch", "g 0 0 2 0 0 0 0")
	c.file("form.hcl", strings.NewReplacer(`job "mon"`, `job "form"`, `type = "system"`, "type = \"sysbatch\"\n  parameterized {}").Replace(systemSpec))
	c.run("job run form.hcl", "Job registration successful")
	c.run("job dispatch -detach form", "Dispatched Job ID = form/dispatch-")
	c.run("job status form", "Type = sysbatch", "Parameterized Job", "running")
	c.file("fix.hcl", strings.NewReplacer(`job "mon"`, `job "fix"`, `"system"`, `"service"`).Replace(systemSpec))
	c.fails(1, "job run -detach fix.hcl", "cannot be changed into or from a sysbatch job: purge it first")
}
