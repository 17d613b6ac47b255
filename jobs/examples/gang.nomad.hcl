# Training over several processes: all four are placed or none, in one rack if there is room, and each
# knows its rank. It gives way to urgent work, is told so first, and goes on from its checkpoint.
# Where urgent work may preempt is the operator's to say:
#
#   nomad operator scheduler set-config -preempt-batch-scheduler=true
job "train" {
  type     = "batch"
  priority = 20

  group "ranks" {
    count = 4

    meta {
      rx_gang           = "true"
      rx_topology       = "node, ${meta.rack}"
      rx_min_runtime    = "10s"
      rx_preempt_grace  = "1m"
      rx_preempt_signal = "SIGUSR1"
    }

    task "rank" {
      driver = "raw_exec"

      config {
        command = "/bin/sh"
        args = ["-c", <<EOS
step=$${RX_CHECKPOINT_STEP:-0}
echo "rank $RX_GANG_RANK of $RX_GANG_SIZE begins at step $step"
save() { printf '{"step": %d, "path": "/checkpoints/%d"}' "$step" "$step" > "$NOMAD_TASK_DIR/rx_checkpoint.json"; exit 0; }
trap save USR1
while [ "$step" -lt 100 ]; do step=$((step + 1)); sleep 1; done
EOS
        ]
      }

      resources {
        cpu    = 50
        memory = 32
      }
    }
  }
}
