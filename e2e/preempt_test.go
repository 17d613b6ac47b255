package e2e

import (
	"fmt"
	"regexp"
	"strings"
	"testing"
)

// TestPreemption: through the nomad command line and on real processes, work of low priority makes
// room for urgent work, saves what it did when it is told to, and goes on from there.
func TestPreemption(t *testing.T) {
	nomad := nomadBinary(t)
	p := newPlatform(t)
	p.start()
	port := strings.TrimPrefix(freeAddr(t), "127.0.0.1:") // what both need
	job := func(name string, priority int, meta, script string) string {
		return write(t, name+".nomad.hcl", fmt.Sprintf(`job %q {
  type     = "batch"
  priority = %d
  group "g" {
    meta {
      %s
    }
    network {
      port "only" {
        static = %s
      }
    }
    task "t" {
      driver = "raw_exec"
      config {
        command = "/bin/sh"
        args    = ["-c", <<EOS
%s
EOS
        ]
      }
      resources {
        cpu    = 20
        memory = 16
      }
    }
  }
}
`, name, priority, meta, port, script))
	}
	logs := func(job, want string) {
		t.Helper()
		p.await(job+" prints "+want, func() bool {
			r := p.command(nomad, "alloc", "logs", "-job", job)
			return r.code == 0 && strings.Contains(r.text, want)
		})
	}
	low := job("low", 20, `rx_gang = "true"
      rx_preempt_grace = "10m"`, `echo "rank $RX_GANG_RANK of $RX_GANG_SIZE, step $${RX_CHECKPOINT_STEP:-0} of $RX_CHECKPOINT_PATH"
save() { echo '{"step": 42, "path": "/ckpt/42"}' > $NOMAD_TASK_DIR/rx_checkpoint.json; exit 0; }
trap save TERM
while :; do sleep 0.1; done`)
	urgent := job("urgent", 70, "", `echo urgent begins; sleep 600`)

	p.nomad(0, "job", "run", low).has(t, "finished with status \"complete\"")
	logs("low", "rank 0 of 1, step 0 of \n")
	var first []string
	p.await("low is told to run", func() bool { // which may be after it has printed
		first = regexp.MustCompile(`(?m)^([0-9a-f]{8})\s.*running`).FindStringSubmatch(p.nomad(0, "job", "status", "low").text)
		return first != nil
	})
	p.nomad(1, "job", "plan", urgent).has(t, "WARNING: Failed to place")
	p.nomad(0, "operator", "scheduler", "set-config", "-preempt-batch-scheduler=true").has(t, "Scheduler configuration updated")
	p.nomad(1, "job", "plan", urgent).has(t, "Preemptions", first[1], "low")
	p.nomad(0, "job", "run", "-detach", urgent).has(t, "Job registration successful")
	logs("urgent", "urgent begins")
	p.nomad(0, "alloc", "status", "-verbose", first[1]).has(t, "Preempted by", "may save its work", "evict")
	var allocs []struct{ ID string }
	p.get("/v1/job/low/allocations", &allocs)
	var saved struct{ Checkpoints map[string]struct{ Step int } }
	if p.get("/v1/allocation/"+allocs[0].ID, &saved); saved.Checkpoints["t"].Step != 42 {
		t.Errorf("its checkpoints: %+v", saved)
	}
	p.nomad(0, "job", "status", "low").has(t, "pending")

	p.nomad(0, "job", "stop", "-purge", "urgent")
	logs("low", "rank 0 of 1, step 42 of /ckpt/42\n")
	p.nomad(0, "job", "stop", "-purge", "low")
}
