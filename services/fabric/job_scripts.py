"""The steps of the queue that must be one: look and queue, look and claim, look and end. Lua, run by Redis."""

# KEYS: stream, job. ARGV: id, fingerprint of what was asked, request, time, most entries.
SUBMIT = """
local asked = redis.call('HGET', KEYS[2], 'asked')
if asked then
  if asked ~= ARGV[2] then return 'other' end
  return redis.call('HGET', KEYS[2], 'state')
end
if redis.call('XLEN', KEYS[1]) >= tonumber(ARGV[5]) then return 'full' end
redis.call('HSET', KEYS[2], 'asked', ARGV[2], 'request', ARGV[3], 'created', ARGV[4], 'state', 'JOB_STATE_QUEUED')
redis.call('XADD', KEYS[1], '*', 'job', ARGV[1])
return 'JOB_STATE_QUEUED'
"""

# KEYS: stream. ARGV: group, consumer, entry, idle time to set in ms. JUSTID: not a delivery.
HEARTBEAT = """
local pending = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1)
if #pending == 0 or pending[1][2] ~= ARGV[2] then return 0 end
redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[3], 'IDLE', ARGV[4], 'JUSTID')
return 1
"""

# KEYS: stream, job. ARGV: group, entry, state, outcome, time, seconds to keep the job.
FINISH = """
local state = redis.call('HGET', KEYS[2], 'state')
if state and state ~= 'JOB_STATE_SUCCEEDED' and state ~= 'JOB_STATE_FAILED' then
  redis.call('HSET', KEYS[2], 'state', ARGV[3], 'outcome', ARGV[4], 'finished', ARGV[5])
  redis.call('EXPIRE', KEYS[2], ARGV[6])
end
redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
return redis.call('XDEL', KEYS[1], ARGV[2])
"""
